"""A drop-in optimizer for plain PyTorch loops: `optimizer = MemTraceOptimizer(optimizer, model)`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from types import MethodType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.config import TracerConfig
from memtrace.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer as _Base
else:
    _Base = object  # at run time a wrapper is, besides, of the class of what it wraps, whatever that is

_OWN = frozenset({"_memtrace_optimizer", "_memtrace_step", "_memtrace_tracer"})


class MemTraceOptimizer(_Base):
    """The given optimizer, with a MemoryTracer attached to it and to the model.

    The wrapper shares the dictionary of the wrapped optimizer, and its class is derived from that one's: every method,
    argument, default and hook is the optimizer's own, and `isinstance` says so. Hooks get the object whose method was
    called. The wrapper's own are `tracer`, `close()` and the context manager, `optimizer` where the wrapped one has no
    such attribute, and what a learning-rate scheduler puts over `step`. Pickling and copying give the bare optimizer,
    since a copy has no model to trace.

    The tracer runs until `close()` or the end of the process, where the table is shown: see `MemoryTracer`.

    Args:
        optimizer: any optimizer that updates the model. A wrapper, as a notebook cell has it that is run again, is
            closed, and what it wraps is wrapped.
        model: the module that is trained.
        further_models: the models beside it, by name: see `tracer.Tracer`. Held weakly.
        **settings: fields of `TracerConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, the optimizer was made for another model, or it is no object
            that can be wrapped.
        OutputError: the port, the address or the log directory cannot be used.
    """

    __slots__ = tuple(_OWN)
    _memtrace_optimizer: torch.optim.Optimizer
    _memtrace_step: Callable[..., Any] | None
    _memtrace_tracer: MemoryTracer

    def __new__(cls, optimizer: torch.optim.Optimizer, model: nn.Module, **settings: Any) -> Self:
        """Returns an object of a class made for the given optimizer."""
        wrapper: Self = object.__new__(_wrapping(cls, _bare(optimizer)))
        return wrapper

    def __init_subclass__(cls, **_: Any) -> None:
        # What the wrapped class does with its subclasses is not for this one.
        pass

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        further_models: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        config = TracerConfig.from_settings(settings)
        if isinstance(optimizer, MemTraceOptimizer):
            optimizer.close()
            optimizer = _bare(optimizer)
        tracer = MemoryTracer(model, optimizer, config, further_models=further_models)
        object.__setattr__(self, "_memtrace_optimizer", optimizer)
        object.__setattr__(self, "_memtrace_step", None)
        object.__setattr__(self, "_memtrace_tracer", tracer)
        object.__setattr__(self, "__dict__", vars(optimizer))
        tracer.attach()

    @property
    def tracer(self) -> MemoryTracer:
        """The tracer: `tracer.latest`, `tracer.history`, `tracer.trace_next()`."""
        return self._memtrace_tracer

    def close(self) -> None:
        """Detaches the tracer: no hook, port or thread is left, and the wrapper goes on as the bare optimizer."""
        self._memtrace_tracer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._memtrace_tracer.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        """Returns what neither the shared dictionary nor the class has: what the wrapped optimizer itself finds."""
        if name in _OWN:
            raise AttributeError(name)
        return self._memtrace_optimizer if name == "optimizer" else getattr(self._memtrace_optimizer, name)

    def __copy__(self) -> torch.optim.Optimizer:
        return copy.copy(self._memtrace_optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.optim.Optimizer:
        return copy.deepcopy(self._memtrace_optimizer, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The one element of a tuple: whoever loads it need not have memtrace.
        return itemgetter(0), ((self._memtrace_optimizer,),)

    def __repr__(self) -> str:
        return f"MemTraceOptimizer({self._memtrace_optimizer!r})"

    def __del__(self) -> None:
        # In place of the one that the wrapped class may have: what it ends belongs to the wrapped optimizer.
        pass


class _Step:
    """The attribute `step` of a wrapper: the wrapped class's own method, which reports what it raises.

    What is assigned to it, as learning-rate schedulers do, is kept by the wrapper and goes with it.
    """

    def __init__(self, kind: type) -> None:
        @functools.wraps(kind.step)  # type: ignore[attr-defined]
        def step(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            before = vars(wrapper).get("step")  # assigned to the optimizer that is wrapped
            try:
                return before(*args, **kwargs) if before else kind.step(wrapper, *args, **kwargs)  # type: ignore[attr-defined]
            except (RuntimeError, MemoryError) as error:
                wrapper.tracer.report_failure(error)
                raise

        self._function = step

    def __get__(self, wrapper: Any, kind: type | None = None) -> Any:
        if wrapper is None:
            return self._function
        assigned = wrapper._memtrace_step
        return MethodType(self._function, wrapper) if assigned is None else assigned

    def __set__(self, wrapper: Any, step: Any) -> None:
        object.__setattr__(wrapper, "_memtrace_step", step)

    def __delete__(self, wrapper: Any) -> None:
        if wrapper._memtrace_step is None:
            raise AttributeError("step")
        object.__setattr__(wrapper, "_memtrace_step", None)


def _bare(optimizer: Any) -> Any:
    """Returns the optimizer itself, where a wrapper of ours is given."""
    return optimizer._memtrace_optimizer if isinstance(optimizer, MemTraceOptimizer) else optimizer


def _wrapping(cls: type[Any], optimizer: object) -> type[Any]:
    """Returns a class that is both the wrapper and the class of the optimizer.

    Raises:
        ConfigError: there can be none, or the object has no dictionary to share.
    """
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise ConfigError(f"MemTraceOptimizer wraps an optimizer, got the class {name}: write {name}(...) itself")
    kind = type(optimizer)
    if isinstance(optimizer, Iterator) or (isinstance(optimizer, list) and any(map(torch.is_tensor, optimizer))):
        raise ConfigError(
            f"MemTraceOptimizer wraps an optimizer, got {kind.__name__}: write the optimizer, not model.parameters()"
        )
    advice = "hand it to MemoryTracer(model, optimizer) instead, and step it as it is"
    if not hasattr(optimizer, "__dict__"):
        raise ConfigError(f"MemTraceOptimizer wraps one optimizer, got a {kind.__name__}: {advice}")
    try:
        return type(kind.__name__, (cls, kind), {"step": _Step(kind)} if hasattr(kind, "step") else {})
    except TypeError as error:
        raise ConfigError(f"MemTraceOptimizer cannot wrap a {kind.__name__} ({error}): {advice}") from error

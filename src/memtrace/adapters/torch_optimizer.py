"""A drop-in optimizer for plain PyTorch loops: `optimizer = MemTraceOptimizer(optimizer, model)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.config import TracerConfig

_OWN = frozenset({"_inner", "_tracer", "step"})
"""Attributes of the wrapper itself; `step` because learning-rate schedulers put theirs over it."""


class MemTraceOptimizer(torch.optim.Optimizer):
    """The given optimizer, with a MemoryTracer attached to it and to the model.

    State, parameter groups, hooks and all other attributes are those of the wrapped optimizer, read and written
    through: state dicts, learning-rate schedulers, GradScaler and `accelerator.prepare` see no difference. Pickling and
    copying give the bare optimizer, since a copy has no model to trace.

    The tracer runs until `close()` or the end of the process; the wrapper is a context manager too.

    Args:
        optimizer: any optimizer that updates the model.
        model: the module that is trained.
        **settings: fields of `TracerConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, or the optimizer was made for another model.
        OutputError: the port, the address or the log directory cannot be used.
    """

    _inner: torch.optim.Optimizer
    _tracer: MemoryTracer

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, **settings: Any) -> None:
        # torch.optim.Optimizer.__init__ is not called: all state is the wrapped optimizer's.
        object.__setattr__(self, "_inner", optimizer)
        tracer = MemoryTracer(model, optimizer, TracerConfig.from_settings(settings))
        tracer.attach()
        object.__setattr__(self, "_tracer", tracer)

    @property
    def tracer(self) -> MemoryTracer:
        """The tracer: `tracer.latest`, `tracer.history`, `tracer.trace_next()`."""
        return self._tracer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._inner

    def close(self) -> None:
        """Detaches the tracer: no hook, port or thread is left, and the wrapper goes on as the bare optimizer."""
        self._tracer.detach()

    def __enter__(self) -> MemTraceOptimizer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._tracer.report_failure(error)
        self.close()

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Performs one step of the wrapped optimizer, with its arguments and its result."""
        try:
            return self._inner.step(**kwargs) if closure is None else self._inner.step(closure, **kwargs)
        except (RuntimeError, MemoryError) as error:
            self._tracer.report_failure(error)
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does what the wrapped optimizer does."""
        self._inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the wrapped optimizer."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state into the wrapped optimizer."""
        self._inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self._inner.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._inner, name, value)

    def __delattr__(self, name: str) -> None:
        if name in _OWN:
            object.__delattr__(self, name)
        else:
            delattr(self._inner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare, (self._inner,)

    def __getstate__(self) -> dict[str, Any]:
        return self._inner.__getstate__()

    def __repr__(self) -> str:
        return f"MemTraceOptimizer({self._inner!r})"


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Gives back the wrapped optimizer when a pickled or copied wrapper is restored."""
    return optimizer

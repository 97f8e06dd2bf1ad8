"""Whatever is asked of the wrapper, the answer is the one of the bare optimizer: a table over all its names."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from memtrace import ConfigError, MemoryTracer, MemTraceOptimizer, TracerConfig

QUIET: dict[str, Any] = {"port": None, "step_log": False, "device_poll_seconds": 0, "strict": True}


class Model(nn.Module):
    """Two layers, of which a batch may leave one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, rows: torch.Tensor, *, both: bool) -> torch.Tensor:
        rows = self.used(rows)
        return self.unused(rows) if both else rows


class Custom(torch.optim.SGD):
    """Has defaults, arguments, attributes and a state of its own in every place where torch's have theirs."""

    _step_supports_amp_scaling = False
    family = "custom"

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.scales: list[float] = []
        self.mode = "train"

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None, *, scale: float = 1.0) -> Any:
        self.scales.append(scale)
        return super().step(closure)

    def state_dict(self, tag: str | None = None) -> dict[str, Any]:
        return super().state_dict() | {"tag": tag}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> str:
        super().load_state_dict(state_dict)
        return f"strict={strict}"

    def add_param_group(self, param_group: dict[str, Any], name: str = "") -> None:
        super().add_param_group(param_group | ({"name": name} if name else {}))

    def eval(self) -> Custom:
        self.mode = "eval"
        return self

    @property
    def steps(self) -> int:
        return len(self.scales)

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        self.param_groups[0]["lr"] = value

    def __len__(self) -> int:
        return len(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"mode": self.mode, "scales": self.scales}


def _plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"torch's": _plain, "custom": Custom}


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    for number in range(steps):
        model(torch.ones(2, 4), both=number == 0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _values(value: Any) -> Any:
    """Returns a value that can be compared: tensors as lists, containers part by part."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(key if isinstance(key, (str, int)) else "tensor", _values(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [_values(part) for part in value]
    return value


def _heard(optimizer: Any, name: str, model: nn.Module) -> Any:
    """Returns what hooks of one kind are called with, by their arguments' names, and that they come off."""
    calls: list[Any] = []

    def hook(given: Any, *rest: Any) -> Any:
        calls.append((given is optimizer, len(rest), _values(rest[1:] if "step" in name else rest)))

    handle = getattr(optimizer, name)(hook)
    for _ in range(2):
        _trained(optimizer, model, steps=1)
        optimizer.load_state_dict(optimizer.state_dict())
        handle.remove()
    return calls


def _changed_by_state_dict_hooks(optimizer: Any, model: nn.Module) -> Any:
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1}, prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": _slower(state)})
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer.param_groups[0]["lr"], optimizer.state_dict()["extra"]


def _slower(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]


def _changed_by_step_hook(optimizer: Any, model: nn.Module) -> Any:
    def closure() -> float:
        return 7.0

    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], closure), {}))
    return optimizer.step()


def _set_state(optimizer: Any, model: nn.Module) -> Any:
    state = optimizer.__getstate__()
    optimizer.__setstate__({**state, "param_groups": [{**optimizer.param_groups[0], "lr": 0.25}], "further": [1]})
    _trained(optimizer, model)
    return optimizer.param_groups[0]["lr"], optimizer.further, len(optimizer.state), vars(optimizer)["further"]


def _renamed(optimizer: Any, model: nn.Module) -> Any:
    optimizer.further = 3
    found = optimizer.further, "further" in vars(optimizer), getattr(optimizer, "nothing", "nothing")
    del optimizer.further
    return found, hasattr(optimizer, "further")


def _missing(optimizer: Any, model: nn.Module) -> str:
    with pytest.raises(AttributeError) as error:
        optimizer.nothing  # noqa: B018
    return str(error.value)


def _state_rebound(optimizer: Any, model: nn.Module) -> Any:
    optimizer.state = type(optimizer.state)(dict)
    _trained(optimizer, model, steps=1)
    return _values(dict(optimizer.state))


def _grown(optimizer: Any, model: nn.Module, **more: Any) -> Any:
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5}, **more)
    extra.grad = torch.ones(2)
    optimizer.step()
    return _values(extra.detach()), len(optimizer.param_groups), optimizer.param_groups[-1].get("name")


def _stepped(optimizer: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    model(torch.ones(2, 4), both=True).sum().backward()
    return optimizer.step(*args, **kwargs), _values(list(model.parameters()))


def _zeroed(optimizer: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    model(torch.ones(2, 4), both=True).sum().backward()
    optimizer.zero_grad(*args, **kwargs)
    return [None if parameter.grad is None else _values(parameter.grad) for parameter in model.parameters()]


def _patched(optimizer: Any, model: nn.Module) -> Any:
    calls: list[float] = []
    original = optimizer.step
    optimizer.step = lambda: calls.append(1.0) or original()
    _trained(optimizer, model)
    return calls, _values(list(model.parameters()))


Case = Callable[[Any, nn.Module], Any]
CASES: dict[str, Case] = {
    "add_param_group": _grown,
    "defaults": lambda o, m: _values(o.defaults),
    "load_state_dict": lambda o, m: (o.load_state_dict(copy.deepcopy(o.state_dict())), _values(o.state_dict())),
    "OptimizerPostHook": lambda o, m: o.OptimizerPostHook is torch.optim.Optimizer.OptimizerPostHook,
    "OptimizerPreHook": lambda o, m: o.OptimizerPreHook is torch.optim.Optimizer.OptimizerPreHook,
    "param_groups": lambda o, m: _values(o.param_groups),
    "profile_hook_step": lambda o, m: o.profile_hook_step is torch.optim.Optimizer.profile_hook_step,
    "register_load_state_dict_post_hook": lambda o, m: _heard(o, "register_load_state_dict_post_hook", m),
    "register_load_state_dict_pre_hook": lambda o, m: _heard(o, "register_load_state_dict_pre_hook", m),
    "register_state_dict_post_hook": lambda o, m: _heard(o, "register_state_dict_post_hook", m),
    "register_state_dict_pre_hook": lambda o, m: _heard(o, "register_state_dict_pre_hook", m),
    "register_step_post_hook": lambda o, m: _heard(o, "register_step_post_hook", m),
    "register_step_pre_hook": lambda o, m: _heard(o, "register_step_pre_hook", m),
    "state": lambda o, m: _values(dict(o.state)),
    "state_dict": lambda o, m: _values(o.state_dict()),
    "step": _stepped,
    "zero_grad": _zeroed,
    # How each of them is called, and what else is done with an optimizer.
    "state-dict hooks that change": _changed_by_state_dict_hooks,
    "step hooks that change": _changed_by_step_hook,
    "signatures": lambda o, m: {n: str(inspect.signature(getattr(o, n))) for n in ("step", "zero_grad", "state_dict")},
    "step with a closure": lambda o, m: _stepped(o, m, lambda: 3.5),
    "zero_grad in place": lambda o, m: _zeroed(o, m, False),
    "zero_grad by name": lambda o, m: _zeroed(o, m, set_to_none=True),
    "__getstate__": lambda o, m: _values(o.__getstate__()),
    "__setstate__": _set_state,
    "new attributes": _renamed,
    "missing attributes": _missing,
    "another state": _state_rebound,
    "a step put over it": _patched,
    "copy": lambda o, m: _answer_of_copy(copy.copy(o)),
    "deepcopy": lambda o, m: _answer_of_copy(copy.deepcopy(o)),
    "pickle": lambda o, m: _answer_of_copy(pickle.loads(pickle.dumps(o))),
    "oldest pickle": lambda o, m: _answer_of_copy(pickle.loads(pickle.dumps(o, protocol=0))),
    "isinstance": lambda o, m: (isinstance(o, torch.optim.Optimizer), isinstance(o, (torch.optim.AdamW, Custom))),
    "name of the class": lambda o, m: type(o).__name__,
    "_step_supports_amp_scaling": lambda o, m: getattr(o, "_step_supports_amp_scaling", None),
    "truth": lambda o, m: bool(o),
}
OWN_CASES: dict[str, Case] = {
    "family": lambda o, m: o.family,
    "scales": lambda o, m: o.scales,
    "mode": lambda o, m: o.mode,
    "eval": lambda o, m: (o.eval() is o, o.mode),
    "steps": lambda o, m: o.steps,
    "lr": lambda o, m: (setattr(o, "lr", 0.75), o.lr, o.param_groups[0]["lr"]),
    "step with more": lambda o, m: (_stepped(o, m, scale=0.5), o.scales),
    "state_dict with more": lambda o, m: _values(o.state_dict(tag="mine")),
    "load_state_dict with more": lambda o, m: o.load_state_dict(o.state_dict(), strict=False),
    "add_param_group with more": lambda o, m: _grown(o, m, name="grown"),
    "length": lambda o, m: len(o),
}


def _answer_of_copy(copied: torch.optim.Optimizer) -> Any:
    """Returns what a copy is: a bare optimizer with the state, which can step."""
    copied.step()
    return type(copied).__module__, type(copied).__qualname__, _values(dict(copied.state)), vars(copied).keys()


@contextmanager
def _made(kind: str, *, wrapped: bool) -> Iterator[tuple[torch.optim.Optimizer, nn.Module]]:
    torch.manual_seed(0)
    model = Model()
    inner = KINDS[kind](model.parameters())
    if wrapped:
        with MemTraceOptimizer(inner, model, trace_every=1, **QUIET) as outer:
            yield _trained(outer, model), model
    else:
        yield _trained(inner, model), model


def _answer(kind: str, case: Case, *, wrapped: bool) -> Any:
    with _made(kind, wrapped=wrapped) as (optimizer, model):
        return case(optimizer, model), _values(list(model.parameters())), _values(optimizer.param_groups)


TABLE = [(kind, name) for kind in KINDS for name in CASES] + [("custom", name) for name in OWN_CASES]


@pytest.mark.parametrize(("kind", "name"), TABLE)
def test_each_answer_is_the_bare_optimizers(kind: str, name: str) -> None:
    """The result, the weights and the groups afterwards are those without the wrapper."""
    case = {**CASES, **OWN_CASES}[name]
    assert _answer(kind, case, wrapped=True) == _answer(kind, case, wrapped=False)


def test_the_table_has_every_public_name() -> None:
    """Of torch's base class, of an instance and of the custom class: a name that torch adds must be looked at here."""
    with _made("custom", wrapped=False) as (optimizer, _):
        public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public <= {*CASES, *OWN_CASES}


def test_pickle_needs_no_memtrace_and_keeps_identity() -> None:
    """The bytes do not name memtrace, and wrapper and wrapped come back as one object."""
    with _made("torch's", wrapped=True) as (wrapped, _):
        data = pickle.dumps([wrapped, wrapped.optimizer])
    assert b"memtrace" not in data
    first, second = pickle.loads(data)
    assert first is second
    assert type(first) is torch.optim.AdamW


@pytest.mark.parametrize("order", ["scheduler first", "wrapper first"])
def test_a_scheduler_made_before_or_after(order: str) -> None:
    """Both count steps, no scheduler warns, and a failed step is still reported."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.parameters())
    if order == "scheduler first":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    with MemTraceOptimizer(inner, model, **QUIET) as wrapped:
        if order == "wrapper first":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(wrapped, 0.5)
        for _ in range(2):
            _trained(wrapped, model, steps=1)
            scheduler.step()
        assert scheduler.get_last_lr() == [0.25 * 0.001]
        assert [record.step for record in wrapped.tracer.history] == [1, 2]


def test_a_wrapper_that_is_gone_takes_its_patches_along() -> None:
    """A second wrapper around the same optimizer, with a scheduler of its own, after the first one was dropped."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        with MemTraceOptimizer(inner, model, **QUIET) as wrapped:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(wrapped, 0.5)
            _trained(wrapped, model)
            scheduler.step()
        del wrapped, scheduler
        gc.collect()
    inner.step()
    assert inner.param_groups[0]["lr"] == 0.25 * 0.001


def test_a_destructor_runs_once_and_with_the_wrapped_optimizer() -> None:
    """Optimizers written in C++ give their state up there: dropping the wrapper must not."""
    destroyed: list[bool] = []

    class Native(torch.optim.SGD):
        def __del__(self) -> None:
            destroyed.append(True)

    model = Model()
    inner = Native(model.parameters(), lr=0.1)
    with MemTraceOptimizer(inner, model, **QUIET) as wrapped:
        _trained(wrapped, model)
    del wrapped
    gc.collect()
    assert not destroyed
    del inner
    gc.collect()
    assert destroyed == [True]


def test_what_the_wrapped_class_does_with_subclasses_is_not_done() -> None:
    """A registry of optimizers does not get a new entry."""
    registered: list[type] = []

    class Registered(torch.optim.SGD):
        def __init_subclass__(cls, *, name: str) -> None:
            registered.append(cls)

    model = Model()
    with MemTraceOptimizer(Registered(model.parameters(), lr=0.1), model, **QUIET) as wrapped:
        _trained(wrapped, model)
    assert not registered


def test_a_wrapper_around_accelerates_wrapper() -> None:
    """Its attribute `optimizer` stays its own, and each step is one."""
    Accelerator(cpu=True)  # the state that its wrapper asks for
    model = Model()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[object] = []
    bare.register_step_post_hook(lambda *_: calls.append(1))
    with MemTraceOptimizer(AcceleratedOptimizer(bare), model, **QUIET) as wrapped:
        assert wrapped.optimizer is bare
        _trained(wrapped, model)
        assert len(calls) == len(wrapped.tracer.history) == 3


def test_an_optimizer_that_is_no_torch_optimizer() -> None:
    """A wrapper that hands on by `__getattr__` alone, and is no `Optimizer`, is wrapped as what it is."""

    class Proxy:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["optimizer"], name)

    model = Model()
    with MemTraceOptimizer(Proxy(torch.optim.AdamW(model.parameters())), model, **QUIET) as wrapped:
        _trained(wrapped, model)
        assert not isinstance(wrapped, torch.optim.Optimizer)
        assert isinstance(wrapped, Proxy)
        assert len(wrapped.tracer.history) == 3


def test_a_tracer_beside_the_wrapper() -> None:
    """A tracer made for the wrapper counts the steps too, and so does one made for the wrapped optimizer."""
    model = Model()
    inner = torch.optim.AdamW(model.parameters())
    config = TracerConfig(**QUIET)
    with (
        MemTraceOptimizer(inner, model, **QUIET) as wrapped,
        MemoryTracer(model, wrapped, config) as outer,
        MemoryTracer(model, inner, config) as beside,
    ):
        _trained(wrapped, model)
        _trained(inner, model)
        assert len(wrapped.tracer.history) == len(outer.history) == len(beside.history) == 6


def test_a_compiled_step() -> None:
    """`torch.compile` of the wrapper's step trains as that of the bare one."""

    def run(wrap: bool) -> list[Any]:
        torch.manual_seed(0)
        model = Model()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrap:
            optimizer = MemTraceOptimizer(optimizer, model, **QUIET)
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            model(torch.ones(2, 4), both=True).sum().backward()
            step()
            optimizer.zero_grad()
        if wrap:
            optimizer.close()
        return _values(list(model.parameters()))

    assert run(True) == run(False)


def test_the_wrapper_keeps_nothing_that_the_wrapped_one_would_not() -> None:
    """Dropped together after `close()`, both are gone at once, state included, without the collector."""
    model = Model()
    inner = torch.optim.AdamW(model.parameters())
    wrapped = MemTraceOptimizer(inner, model, **QUIET)
    _trained(wrapped, model)
    wrapped.close()
    alive = [weakref.ref(inner), weakref.ref(next(iter(inner.state.values()))["exp_avg"])]
    gc.collect()
    gc.disable()
    try:
        del wrapped, inner
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


class _Slotted:
    __slots__ = ("optimizer",)


@pytest.mark.parametrize("given", [[], {}, _Slotted()], ids=["list", "dict", "slots"])
def test_what_cannot_be_wrapped_is_refused(given: object) -> None:
    """One clear error that names the way that works."""
    with pytest.raises(ConfigError, match=r"MemTraceOptimizer wraps one optimizer, got a \w+: hand it to MemoryTracer"):
        MemTraceOptimizer(given, Model(), **QUIET)


def test_swapped_arguments_are_refused() -> None:
    """The model first: the error says what was expected."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"the model must be a torch\.nn\.Module, got AdamW.*swapped"):
        MemTraceOptimizer(model, optimizer, **QUIET)
    with pytest.raises(ConfigError, match=r"the model must be a torch\.nn\.Module, got AdamW.*swapped"):
        MemoryTracer(optimizer, model, TracerConfig(**QUIET))

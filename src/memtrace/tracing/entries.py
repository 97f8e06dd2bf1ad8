"""The modules by which a training enters a model without calling it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum, auto
from inspect import getattr_static

import torch
from torch import nn

from memtrace.guard import Guard
from memtrace.sources.autograd_torch_private import backward_is_running
from memtrace.sources.hooks import HookSet, outside_graphs

_MOST = 64
"""Modules that are followed in a window at most: a loop may call each layer of a model by itself."""
_LOOKS = 2
"""Steps in a row for which all modules are listened to."""
_CALLED_ENOUGH = 3
"""Steps in a row that begin with a call of the model, after which no module inside it is followed."""

Hook = Callable[..., None]


class _Followed(Enum):
    """Which modules inside the model have hooks."""

    NONE = auto()
    EVERY = auto()
    """Every one, to find those that the training calls."""
    FIRST_AND_LAST = auto()
    """Of those that the training calls."""
    CALLED = auto()
    """Those that the training calls."""


class Entries:
    """Hooks on modules inside a model, where the training calls those and not the model.

    `model.loss(x)`, a `training_step`, an agent's `evaluate_actions`, a fused loss on `model.model(x)`, two networks in
    a `ModuleList`: the model's own hooks are never called. After a step without a forward pass all modules inside it
    are listened to, for two steps. Those that were called by no other one stand for the model from then on: its forward
    pass begins with the one that was the first of a step, and ends with the one that was the last. While a window is
    open all of them are followed, up to 64.

    A model that has a `forward` has none of these hooks until such a step, and none after three steps in a row that
    begin with a call of the model. Modules are listened to again after as many more steps without a forward pass as
    there were before. Inside a graph of torch's compiler none is heard.

    Args:
        model: the module that is trained.
        before: called with (module, args, kwargs) before a forward pass; says what the compiler sees, see `Apart`.
        after: called with (module, args, output) after it, also where it has raised; likewise.
        guard: runs what decides.
    """

    def __init__(self, model: nn.Module, before: Hook, after: Hook, guard: Guard) -> None:
        self._model, self._before, self._after = model, before, after
        self._begins = outside_graphs(guard.wrap(self._on_forward))
        self._ends = outside_graphs(guard.wrap(self._on_forward_end))
        self._hooks = HookSet()
        self._followed = _Followed.NONE
        self._called: dict[int, weakref.ref[nn.Module]] = {}
        """What the training calls, in the order of the first calls."""
        self._first: dict[int, weakref.ref[nn.Module]] = {}
        """Those that were the first of a step."""
        self._last: dict[int, weakref.ref[nn.Module]] = {}
        """Those that were the last of a step."""
        self._latest: weakref.ref[nn.Module] | None = None
        """The module that was called last in the step at work, as far as it was followed."""
        self._inside: nn.Module | None = None
        """The module that is followed and runs now."""
        self._ending: set[int] = set()
        """Identities of the modules whose end is told to `_on_forward_end`."""
        self._looks_left = 0
        self._unheard = 0
        """Steps without a forward pass so far."""
        self._called_enough = 0
        """Steps in a row that began with a call of the model."""
        if _has_no_forward(model):
            self._follow_every()

    @property
    def are_followed(self) -> bool:
        """Whether modules inside the model have hooks."""
        return self._followed is not _Followed.NONE

    def model_begins(self) -> None:
        """Notes that a forward pass is one of the model: what runs inside it is not called from outside."""
        self._inside = self._model

    def model_ends(self) -> None:
        """Notes that it has ended."""
        self._inside = None

    def steps_are_skipped(self) -> None:
        """Listens to nobody who is not known: skipped steps have no time for it."""
        if self._followed is _Followed.EVERY:
            self._follow_first_and_last()

    def window_opens(self, running: nn.Module) -> None:
        """Follows all that the training calls; `running` is the module whose forward pass begins now."""
        if self._followed is _Followed.FIRST_AND_LAST and running is not self._model:
            self.take_off()
            self._followed, self._inside, self._latest = _Followed.CALLED, running, weakref.ref(running)
            for module in _alive(self._called):
                self._hooks.before_forward(module, self._begins, breaks_graphs=False)
                self._follow_end(module)

    def step_ends(self, entered_by: int | None, *, window_is_open: bool) -> None:
        """Decides what to follow in the next step.

        Args:
            entered_by: identity of the module that was called first; None where none was heard.
            window_is_open: whether a window goes on.
        """
        last = None if self._latest is None else self._latest()
        if last is not None:
            _note(self._last, last)
        self._latest = self._inside = None
        self._looks_left = max(0, self._looks_left - 1)
        self._called_enough = self._called_enough + 1 if entered_by == id(self._model) else 0
        self._unheard += entered_by is None
        if entered_by is None and not self._unheard & (self._unheard - 1):
            self._follow_every()
        elif self._called_enough >= _CALLED_ENOUGH:
            self.take_off()
        elif (
            (self._followed is _Followed.EVERY and not self._looks_left)
            or (self._followed is _Followed.CALLED and not window_is_open)
            or (self._followed is _Followed.NONE and entered_by is None)
        ):
            self._follow_first_and_last()

    def take_off(self) -> None:
        """Takes off all hooks."""
        self._hooks.close()
        self._ending.clear()
        self._inside, self._followed = None, _Followed.NONE

    def release(self) -> None:
        """Takes off all hooks for good, and refers to nothing of the watch any more."""
        self.take_off()
        self._before = self._after = self._begins = self._ends = _nothing

    def _follow_every(self) -> None:
        self.take_off()
        self._followed, self._looks_left = _Followed.EVERY, _LOOKS
        for module in self._model.modules():
            if module is not self._model and not isinstance(module, torch.jit.ScriptModule):
                self._hooks.before_forward(module, self._begins, breaks_graphs=False)

    def _follow_first_and_last(self) -> None:
        self.take_off()
        first, last = _alive(self._first), _alive(self._last)
        for module in first:
            self._hooks.before_forward(module, self._before, breaks_graphs=False)
        for module in last:
            self._hooks.after_forward(module, self._after, breaks_graphs=False)
        if first:
            self._followed = _Followed.FIRST_AND_LAST

    def _follow_end(self, module: nn.Module) -> None:
        if id(module) not in self._ending:
            self._ending.add(id(module))
            self._hooks.after_forward(module, self._ends, breaks_graphs=False)

    def _on_forward(self, module: nn.Module, args: object, kwargs: object) -> None:
        inner = self._inside is not None and self._inside is not module
        if inner or not torch.is_grad_enabled() or backward_is_running():
            return
        self._inside = module
        self._follow_end(module)
        if self._latest is None:
            _note(self._first, module)
        self._latest = weakref.ref(module)
        _note(self._called, module)
        self._before(module, args, kwargs)

    def _on_forward_end(self, module: nn.Module, args: object, output: object) -> None:
        if self._inside is module:
            self._inside = None
            self._after(module, args, output)


def _nothing(*_: object) -> None:
    """Stands for what is called, once nobody is followed any more."""


def _has_no_forward(module: nn.Module) -> bool:
    """Whether a module cannot be called, as a `ModuleList`."""
    forward = getattr_static(type(module), "forward")  # asked of itself, that of a scripted module raises
    return forward is nn.Module.forward and "forward" not in vars(module)


def _note(modules: dict[int, weakref.ref[nn.Module]], module: nn.Module) -> None:
    known = modules.get(id(module))
    if (known is None and len(modules) < _MOST) or (known is not None and known() is None):
        modules[id(module)] = weakref.ref(module)


def _alive(modules: dict[int, weakref.ref[nn.Module]]) -> list[nn.Module]:
    return [found for reference in modules.values() if (found := reference()) is not None]

"""Hooks around the steps of optimizers that may come off inside of a step, where torch raises if one is missing."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from memtrace.sources import torch_private


class BeforeAnyStep:
    """A hook before the steps of all optimizers, which may be taken off in its own call. torch's compiler hears none.

    It goes with its object: torch holds this hook where no collector looks.

    Args:
        method: a bound method, which is called with the optimizer that is stepped.
    """

    def __init__(self, method: Callable[[object], None]) -> None:
        self._at_work: set[int] = set()
        """The threads whose optimizers call it now."""
        handles: list[RemovableHandle] = []
        self._alive = weakref.WeakMethod(method, lambda _: leave_steps(handles))
        self._handle = register_optimizer_step_pre_hook(self)  # from now on any thread may call
        handles.append(self._handle)

    def __call__(self, stepped: object, *_: object) -> None:
        """Called by torch, with the arguments of the step."""
        if torch.compiler.is_compiling():
            return
        method = self._alive()
        if method is None:
            return
        thread = threading.get_ident()
        self._at_work.add(thread)
        try:
            method(stepped)
        finally:
            self._at_work.discard(thread)

    def take_off(self) -> None:
        """Takes it off; a second call does nothing. In its own call it leaves a place where others come after it."""
        number, hooks = self._handle.id, self._handle.hooks_dict_ref() or {}
        if self._at_work and number in hooks and next(reversed(hooks)) != number:
            hooks[number] = _LeftOn([self._handle])
        else:
            self._handle.remove()


def leave_steps(handles: list[RemovableHandle]) -> None:
    """Takes hooks off an optimizer, those before and after its steps, also inside one of its steps."""
    if not torch_private.is_stepping():
        for handle in handles:
            handle.remove()
        return
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            hooks[handle.id] = _LeftOn(handles)


class _LeftOn:
    """Does nothing, in the place of a hook that was taken off inside a step: torch raises where one of them is missing.

    The one before a step takes the one after it off, and the other way round. Each goes by itself where it is the last:
    else it stays, and refers to nothing but its place.

    Args:
        handles: of both.
    """

    __slots__ = ("_handles",)

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def __call__(self, *_: object) -> None:
        for handle in self._handles:
            hooks = handle.hooks_dict_ref() or {}
            if handle.id in hooks and (hooks[handle.id] is not self or next(reversed(hooks)) == handle.id):
                handle.remove()

"""The thread on which a window was opened, and what can be taken off there alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from torch import nn

from memtrace.guard import Guard
from memtrace.sources.autograd_torch_private import backward_is_running
from memtrace.sources.cpu import is_gone
from memtrace.sources.events import EventSource
from memtrace.sources.hooks import HookSet
from memtrace.sources.saved_tensors import SavedTensors


class WindowThread:
    """Knows the thread on which the last window was opened, and takes off there what another one had to leave.

    The thread is held weakly: it may have what it has made as an attribute. What is left for later keeps no model.

    Args:
        model: whose forward passes are waited for.
        source: the recording.
        guard: runs what they call.
    """

    def __init__(self, model: nn.Module, source: EventSource, guard: Guard) -> None:
        self._model, self._source, self._guard = weakref.ref(model), source, guard
        self._leftover = HookSet()
        """A hook that takes off what could not come off where a window was abandoned."""
        self._left: SavedTensors | None = None
        self.begin()

    def begin(self) -> None:
        """Takes this thread for the one on which a window is opened."""
        self._thread = weakref.ref(threading.current_thread())

    @property
    def is_here(self) -> bool:
        """Whether the last window was opened on this thread, or nobody can go back to the one where it was."""
        thread = self._thread()
        return thread is None or thread is threading.current_thread() or is_gone(thread)

    def forget(self) -> None:
        """Waits for no forward pass any more."""
        self._leftover.close()

    def let_go(self, saved: SavedTensors) -> None:
        """Takes off the saved-tensor hooks and ends the recording, as far as that is possible here and now."""
        if backward_is_running():
            return
        saved.pop()
        here = self.is_here
        if here:
            self.forget()
        if here or self._source.hears_this_thread():
            self._source.abandon()

    def rest(self) -> Callable[[], None]:
        """Returns what takes off what was left for later, unless the model is gone, and with it what there was."""
        alive = weakref.ref(self)

        def take_off() -> None:
            found = alive()
            if found is not None and found._left is not None:
                found.let_go(found._left)

        return take_off

    def later(self, saved: SavedTensors, leave: Callable[[], None]) -> None:
        """Takes off what is left with the model's next forward pass.

        Args:
            saved: the saved-tensor hooks.
            leave: a method, called as long as its object is there, which does more than `let_go`.
        """
        model, alive, self._left = self._model(), weakref.WeakMethod(leave), saved

        def forward_begins() -> None:
            found = alive()
            if found is None:
                self.let_go(saved)
            else:
                found()

        self.forget()
        if model is not None:
            self._leftover.before_forward(model, lambda *_: self._guard.finish(forward_begins))

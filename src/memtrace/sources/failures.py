"""Failures that nobody hands to memtrace: an allocation that fails, and what ends the process with an error."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from memtrace.sources import recording_torch_private

OnAllocationFailure = Callable[[int, int, int], None]
"""Called with device index, requested bytes and free bytes of the device, on the thread that asked for memory."""
OnCrash = Callable[[BaseException], None]
"""Called with the exception that nobody has caught, before it is printed."""

OnExit = Callable[[BaseException], None]
"""Called when the script asks `sys.exit()` for an end with an error: with such a SystemExit, whose context is what was
being handled then. It may yet be caught."""

_ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


_Failed = weakref.WeakMethod[OnAllocationFailure] | None
_Exits = weakref.WeakMethod[OnExit] | None


class FailureRelay:
    """Tells its subscribers of failures. There is one a process, since torch and Python have one place for each.

    The allocator's observer cannot be taken off again: it is attached once, with the first subscriber on a CUDA device,
    and does nothing while there is none. `sys.excepthook` and `sys.exit` are chained while there are subscribers: no
    hook hears of a SystemExit, and nothing knows the exit code once the interpreter ends. A `raise SystemExit(1)` is
    seen by neither. Subscribers are held weakly, must not raise, and hear of nothing in a forked child.
    """

    def __init__(self) -> None:
        self._subscribers: dict[int, tuple[_Failed, weakref.WeakMethod[OnCrash], _Exits]] = {}
        self._count = 0
        self._pid = os.getpid()
        self._observing: bool | None = None
        self._chained: _ExceptHook | None = None
        self._before: _ExceptHook = sys.excepthook
        self._chained_exit: Callable[..., Any] | None = None
        self._exit_before: Callable[..., Any] = sys.exit

    def subscribe(
        self,
        on_allocation_failure: OnAllocationFailure | None,
        on_crash: OnCrash,
        *,
        cuda: bool,
        on_exit: OnExit | None = None,
    ) -> Callable[[], None]:
        """Tells bound methods of failures from now on; returns what ends that.

        Args:
            on_allocation_failure: is notified of failed device allocations, where torch has an observer for them.
                None: nobody is.
            on_crash: is notified of an exception that ends the process.
            cuda: whether the subscriber's device is a CUDA device, which must be initialised.
            on_exit: is notified of `sys.exit()` with an error on the main thread. None: nobody is.
        """
        if cuda and self._observing is None:
            self._observing = recording_torch_private.attach_oom_observer(self._allocation_failed)
        self._forget_the_dead()
        if not self._subscribers:
            self._pid = os.getpid()
            self._before = sys.excepthook
            # A new object each time: where somebody has chained theirs over an older one of ours, both may be called,
            # and each must go on to what was there before itself.
            self._chained = partial(self._crashed, self._before)
            sys.excepthook = self._chained
            self._exit_before = sys.exit
            self._chained_exit = partial(self._exits, self._exit_before)
            sys.exit = self._chained_exit
        self._count += 1
        number = self._count
        on_failure = None if on_allocation_failure is None else weakref.WeakMethod(on_allocation_failure)
        exits = None if on_exit is None else weakref.WeakMethod(on_exit)
        self._subscribers[number] = (on_failure, weakref.WeakMethod(on_crash, self._died), exits)
        return partial(self._unsubscribe, number)

    def _unsubscribe(self, number: int) -> None:
        # A new dictionary: Python's collector may end a tracer, and so call this, while another one is gone through.
        self._subscribers = {other: methods for other, methods in self._subscribers.items() if other != number}
        self._unchain_if_idle()

    def _unchain_if_idle(self) -> None:
        if self._subscribers:
            return
        if sys.excepthook is self._chained:
            sys.excepthook = self._before
            self._chained = None
        if sys.exit is self._chained_exit:
            sys.exit = self._exit_before
            self._chained_exit = None

    def _died(self, _: object) -> None:
        self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        """Drops subscribers that are gone, and those of the process that this one was forked from."""
        forked = self._pid != os.getpid()
        self._subscribers = {
            number: methods for number, methods in self._subscribers.items() if not forked and methods[1]() is not None
        }
        self._unchain_if_idle()

    def _allocation_failed(self, device: int, requested: int, total: int, free: int) -> None:
        if self._pid != os.getpid():
            return
        for on_failure, _, _ in list(self._subscribers.values()):
            tell = None if on_failure is None else on_failure()
            if tell is not None:
                tell(device, requested, free)

    def _crashed(
        self,
        before: _ExceptHook,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if self._pid == os.getpid():
            for _, on_crash, _ in list(self._subscribers.values()):
                tell = on_crash()
                if tell is not None:
                    tell(error)
        before(kind, error, trace)

    def _exits(self, before: Callable[..., Any], *status: Any) -> Any:
        on_main_thread = threading.current_thread() is threading.main_thread()
        if self._pid == os.getpid() and on_main_thread and any(status):
            error = SystemExit(*status)
            error.__context__ = sys.exc_info()[1]
            for _, _, on_exit in list(self._subscribers.values()):
                tell = None if on_exit is None else on_exit()
                if tell is not None:
                    tell(error)
        return before(*status)


FAILURES = FailureRelay()
"""The relay of this process."""

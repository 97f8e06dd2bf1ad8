"""SIGTERM: how a run that is told to end leaves a sign of it, and ends as it would have without memtrace.

A handler of Python runs on the main thread, once that is between two of its instructions: a process that waits for its
GPU, or for other ranks, would not end by it. So this one is `faulthandler`'s, which runs in C at once and writes a
traceback to a pipe; a thread reads the pipe. What Python knows as the handler of the signal stays as it was.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

OnTermination = Callable[[], None]
"""Called on a thread of memtrace's own, right before the process ends."""

_SIGNAL = signal.SIGTERM
_ROOM = 65536

MAX_SECONDS = 2.0
"""How long subscribers may take together: a file system that hangs must not keep the process."""


class Termination:
    """Tells its subscribers of SIGTERM. There is one a process, since the signal has one handler.

    Where nobody handles the signal, the process ends of it once the subscribers have been told. A handler that was
    there before is called at once, as ever, and decides: then only `has_come` tells of it. One that is set later takes
    the signal over, and nothing tells. An ignored signal stays ignored. Subscribers are held weakly; where one
    raises, the others are not told, and the process ends all the same. A forked child has the handler of before, which
    is let go with the last subscriber.
    """

    def __init__(self) -> None:
        self._subscribers: dict[int, weakref.WeakMethod[OnTermination]] = {}
        self._count = 0
        self._before: Any = None
        self._pipe: tuple[int, int] | None = None
        self._mask: set[int | signal.Signals] | None = None
        """What the forking thread had blocked, while it forks."""
        os.register_at_fork(before=self._forks, after_in_parent=self._unblock, after_in_child=self._forked)

    def subscribe(self, on_termination: OnTermination) -> Callable[[], None]:
        """Tells a bound method of the signal from now on; returns what ends that."""
        if not self._subscribers:
            self._begin()
        self._count += 1
        number = self._count

        def unsubscribe(*_: object) -> None:
            if self._subscribers.keys() == {number}:
                self._end()
            self._subscribers.pop(number, None)  # not before: where Ctrl-C comes it is tried again with the next call

        self._subscribers[number] = weakref.WeakMethod(on_termination, unsubscribe)
        return unsubscribe

    @property
    def has_come(self) -> bool:
        """Whether the signal has come to a handler of the user's while there were subscribers."""
        pipe = self._pipe
        if pipe is None or self._before == signal.SIG_DFL:
            return False
        written = select.poll()
        written.register(pipe[0], select.POLLIN)
        return bool(written.poll(0))

    def _begin(self) -> None:
        self._before = signal.getsignal(_SIGNAL)
        if self._before == signal.SIG_IGN:
            return
        reading, writing = self._pipe = os.pipe()
        os.set_blocking(writing, False)
        by_default = self._before == signal.SIG_DFL
        faulthandler.register(_SIGNAL, file=writing, all_threads=False, chain=not by_default)
        if by_default:
            threading.Thread(target=self._wait, args=(reading,), name="memtrace-termination", daemon=True).start()

    def _end(self) -> None:
        if self._pipe is None:
            return
        self._hand_back()  # first: a handler that stays has its pipe
        pipe, self._pipe = self._pipe, None
        if pipe is None:  # ended meanwhile, by the collector
            return
        os.close(pipe[1])  # which ends the thread
        if self._before != signal.SIG_DFL:
            self._before = None  # a handler may refer to a model, as Lightning's does
            os.close(pipe[0])

    def _hand_back(self) -> None:
        """Restores the handler of before, unless somebody has set another one meanwhile, in place of ours."""
        if signal.getsignal(_SIGNAL) == self._before:
            faulthandler.unregister(_SIGNAL)

    def _wait(self, reading: int) -> None:
        """Reads the pipe until it is closed or the signal has come; then the process ends, whatever is raised."""
        has_come = False
        try:
            has_come = bool(os.read(reading, _ROOM))
            if has_come:
                telling = threading.Thread(target=self._tell, name="memtrace-terminated", daemon=True)
                telling.start()
                telling.join(MAX_SECONDS)
        finally:
            if has_come:
                self._hand_back()
                os.kill(os.getpid(), _SIGNAL)
            with suppress(OSError):
                os.close(reading)

    def _tell(self) -> None:
        for known in list(self._subscribers.values()):
            tell = known()
            if tell is not None:
                tell()

    def _forks(self) -> None:
        """Holds the signal back until a child has the handler of before: with ours it would end its parent instead."""
        if self._pipe is not None:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})

    def _unblock(self) -> None:
        mask, self._mask = self._mask, None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _forked(self) -> None:
        """Gives a child the handler of before."""
        pipe, self._pipe = self._pipe, None
        self._subscribers = {}
        if pipe is not None:
            self._hand_back()
            for end in pipe:
                with suppress(OSError):
                    os.close(end)
        self._before = None
        self._unblock()


TERMINATION = Termination()
"""The one of this process."""

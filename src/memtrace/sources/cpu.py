"""Allocator events of the CPU, from the memory events of torch's profiler."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources import autograd_torch_private, recording_torch_private
from memtrace.sources.events import Events, Window


class CpuEvents:
    """Records what the CPU allocator does on the training thread and the backward threads.

    A block that was allocated outside any window has no free event: the ledger's weak references tell when it died.
    Allocations of threads that the training thread did not start (a DataLoader's pin-memory thread) are not seen.
    Cost: about 4 us for each allocation and each free, recorded and read back, most of it in torch; 0.3 ms a window.

    torch records once a process. A source that was refused has its turn before the one that has refused it opens
    another window, unless six tries go by. A window that refuses another one twice has outlived its step, and gives
    way at the second try; where it has not, but its step is the longer one of the two, its source's next one gives way
    at twice as many.

    A recording ends on the thread that has begun it: `close` on another one loses the window, and leaves the recording
    to the next call on the right thread. It ends with that thread at the latest: up to torch 2.11 one that is left on
    then breaks every later profile of the process. A source that is dropped ends its recording.
    """

    _newest: Callable[[], CpuEvents | None] = staticmethod(lambda: None)
    """The source whose window was opened last in this process."""

    _waiting: Callable[[], CpuEvents | None] = staticmethod(lambda: None)
    """The source that was refused last and has its turn before others."""

    _left_on: threading.Thread | None = None
    """Where a source that is gone has left its recording on: the next window there ends it, or the exit does."""

    def __init__(self) -> None:
        self._begin_ns: int | None = None
        self._thread: threading.Thread | None = None
        """Where our recording is on; None where it is not."""
        self._taken = False
        """Whether the open window has given way to another one."""
        self._refused_by: int | None = None
        """When the window was opened that has refused the last one."""
        self._refusals = 0
        """How often that one has refused."""
        self._refuses = _FIRST_REFUSALS
        """How often a window refuses another one until it gives way."""
        self._gives_turns = 0
        """Tries that are still left to the source that waits."""

    def __del__(self) -> None:
        self._stop()
        if self._thread is not None:  # collected elsewhere, or inside a backward pass
            CpuEvents._left_on = self._thread

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._begin_ns is not None

    def open(self, expected_allocations: int | None = None) -> bool:
        """Begins a window; False where another profiler records or warms up, or torch has no such profiler."""
        if self.is_open:
            return False
        self._stop()
        _end_what_is_left()
        begins = _BEGINNING.setdefault("recording", threading.current_thread())
        if begins is not threading.current_thread() and not is_gone(begins):
            return False  # another thread is about to begin one
        try:
            return self._begin()
        finally:
            _BEGINNING.pop("recording", None)

    def _begin(self) -> bool:
        if _records_elsewhere() or (recording_torch_private.profiler_is_recording() and not self._may_take_the_place()):
            return False
        if recording_torch_private.user_profiler_is_prepared() or self._gives_turn():
            return False
        self._thread = threading.current_thread()  # before there is a recording: then somebody answers for it
        try:
            recording_torch_private.start_memory_profiler()
        except recording_torch_private.ProfilerUnavailable:
            self._thread = None
            return False
        self._begin_ns = time.time_ns()
        if self._thread is not threading.main_thread():
            _end_of_this_thread().of(self)
        self._taken, self._refused_by, self._gives_turns = False, None, _TURNS
        CpuEvents._newest = weakref.ref(self)
        if CpuEvents._waiting() is self:
            CpuEvents._waiting = staticmethod(_nobody)
        return True

    def fits(self, allocations: int) -> bool:
        """Returns True: what is recorded has no bound."""
        return True

    def interrupted(self) -> bool:
        """Whether the window must end: the user has started a profiler of their own inside it, which comes first."""
        return self._begin_ns is not None and (self._taken or recording_torch_private.user_profiler_is_recording())

    def hears_this_thread(self) -> bool:
        """Whether what this thread allocates is recorded: it has begun the window, or runs a backward pass of it."""
        if not self.is_open or self._taken or self._thread is threading.current_thread():
            return True
        return recording_torch_private.profiler_is_recording()

    def close(self) -> Window:
        """Ends the window and returns what happened in it.

        `complete` is False where another profiler took over, where this is another thread, and where torch's own count
        of allocated bytes says that events are missing.
        """
        assert self._begin_ns is not None, "close() without open()"
        begin_ns, end_ns = self._begin_ns, time.time_ns()
        if self._thread is not threading.current_thread():
            self._begin_ns = None
            return Window(begin_ns=begin_ns, end_ns=end_ns, events=Events(), live_at_begin=None, complete=False)
        if recording_torch_private.user_profiler_is_recording() or not recording_torch_private.profiler_is_recording():
            recording_torch_private.give_up_memory_profiler()
            self._begin_ns = self._thread = None
            return Window(begin_ns=begin_ns, end_ns=end_ns, events=Events(), live_at_begin=None, complete=False)
        events, counted = recording_torch_private.stop_memory_profiler()
        self._begin_ns = self._thread = None  # only now: after a fault on the way here abandon() must end the recording
        complete = sum(events.deltas) == counted
        return Window(begin_ns=begin_ns, end_ns=end_ns, events=events, live_at_begin=None, complete=complete)

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""
        if self.is_open:
            self.close()
        self._stop()

    def reading(self) -> AllocatorReading | None:
        """Returns None: the CPU allocator has no counters."""
        return None

    def _stop(self) -> None:
        """Ends a recording that is left, where this thread may: it has begun it, or the one that has is gone."""
        if self._thread is not None and _may_stop(self._thread):
            self._stop_here()

    def _stop_here(self) -> None:
        if recording_torch_private.user_profiler_is_recording() or not recording_torch_private.profiler_is_recording():
            recording_torch_private.give_up_memory_profiler()
        else:
            recording_torch_private.stop_memory_profiler()
        self._thread = None  # not before: where Ctrl-C comes into it, the next call does what is left

    def thread_ends(self) -> None:
        """Ends a recording that is left on this thread, which is about to end."""
        if self._thread is not None and self._thread.ident == threading.get_ident():
            self._stop_here()

    def _may_take_the_place(self) -> bool:
        """Returns whether the recording that is on was ours, and has ended to make room."""
        other = CpuEvents._newest()
        if other is None or other._begin_ns is None or recording_torch_private.user_profiler_is_recording():
            return False
        if self._refused_by != other._begin_ns:
            self._refused_by, self._refusals = other._begin_ns, 0
        self._refusals += 1
        if self._refusals < other._refuses:
            CpuEvents._waiting = weakref.ref(self)
            return False
        other._taken, other._refuses = True, min(2 * other._refuses, _MOST_REFUSALS)
        other._stop()
        if recording_torch_private.profiler_is_recording():
            return False
        CpuEvents._waiting = weakref.ref(other)
        return True

    def _gives_turn(self) -> bool:
        """Returns whether another source waits that this one has refused, and may still try."""
        waiting = CpuEvents._waiting()
        if waiting is None or waiting is self:
            return False
        if not self._gives_turns:
            CpuEvents._waiting = staticmethod(_nobody)
            return False
        self._gives_turns -= 1
        return True


class _ThreadEnd:
    """Kept by one thread alone: it goes when the thread ends, on that thread."""

    def __init__(self) -> None:
        self._source: Callable[[], CpuEvents | None] = _nobody

    def of(self, source: CpuEvents) -> None:
        """Ends the recording of this source, and of none before it."""
        self._source = weakref.ref(source)

    def __del__(self) -> None:
        source = self._source()
        if source is not None:
            source.thread_ends()


_OF_THREAD = threading.local()
"""The end of this thread, where a recording was begun on it."""


def _end_of_this_thread() -> _ThreadEnd:
    """Returns the one end that this thread has: another in its place would let it go, as the end of the thread does."""
    end: _ThreadEnd | None = getattr(_OF_THREAD, "end", None)
    if end is None:
        _OF_THREAD.end = end = _ThreadEnd()
    return end


def _nobody() -> None:
    """Stands for a source, where there is none."""


_FIRST_REFUSALS, _MOST_REFUSALS = 2, 64
_TURNS = 6

_BEGINNING: dict[str, threading.Thread] = {}
"""The thread that begins a recording now: torch has one for all threads, and each thread sees its own only.

No lock: one that Ctrl-C keeps from being released would be held for ever."""


def is_gone(thread: threading.Thread) -> bool:
    """Returns whether nothing runs on this thread any more.

    The main one counts as ended once Python waits for the others, and calls what is to be done at exit after that.
    """
    return thread is not threading.main_thread() and not thread.is_alive()


def _records_elsewhere() -> bool:
    """Returns whether a source records on another thread that is alive."""
    other = CpuEvents._newest()
    thread = None if other is None else other._thread
    return thread is not None and thread is not threading.current_thread() and not is_gone(thread)


def _may_stop(thread: threading.Thread) -> bool:
    """Returns whether this thread may end a recording of that one: it is the same, or that one has ended."""
    here = thread is threading.current_thread() or is_gone(thread)
    return here and not autograd_torch_private.backward_is_running()


def _end_what_is_left() -> None:
    """Ends the recording of a source that was dropped where it could not be ended."""
    thread = CpuEvents._left_on
    if thread is None or not _may_stop(thread):
        return
    CpuEvents._left_on = None
    if recording_torch_private.profiler_is_recording() and not recording_torch_private.user_profiler_is_recording():
        recording_torch_private.stop_memory_profiler()


atexit.register(_end_what_is_left)

"""Allocator events of the CPU, from the memory events of torch's profiler."""

from __future__ import annotations

import time

from memtrace.breakdown import AllocatorReading
from memtrace.sources import torch_private
from memtrace.sources.events import Events, Window


class CpuEvents:
    """Records what the CPU allocator does on the training thread and the backward threads.

    A block that was allocated outside any window has no free event: the ledger's weak references tell when it died.
    Allocations of threads that the training thread did not start (a DataLoader's pin-memory thread) are not seen.
    Cost: about 4 us for each allocation and each free, recorded and read back, most of it in torch; 0.3 ms a window.
    """

    def __init__(self) -> None:
        self._begin_ns: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._begin_ns is not None

    def open(self, expected_allocations: int | None = None) -> bool:
        """Begins a window; False where another profiler records or warms up, or torch has no such profiler."""
        if self.is_open or torch_private.profiler_is_recording() or torch_private.user_profiler_is_prepared():
            return False
        try:
            torch_private.start_memory_profiler()
        except torch_private.ProfilerUnavailable:
            return False
        self._begin_ns = time.time_ns()
        return True

    def fits(self, allocations: int) -> bool:
        """Returns True: the profiler keeps all events."""
        return True

    def interrupted(self) -> bool:
        """Whether the user has started a profiler of their own inside the open window: theirs comes first."""
        return self._begin_ns is not None and torch_private.user_profiler_is_recording()

    def close(self) -> Window:
        """Ends the window and returns what happened in it.

        `complete` is False where another profiler took over, and where torch's own count of allocated bytes says that
        events are missing.
        """
        assert self._begin_ns is not None, "close() without open()"
        begin_ns, end_ns = self._begin_ns, time.time_ns()
        if torch_private.user_profiler_is_recording() or not torch_private.profiler_is_recording():
            torch_private.give_up_memory_profiler()
            self._begin_ns = None
            return Window(begin_ns=begin_ns, end_ns=end_ns, events=Events(), live_at_begin=None, complete=False)
        events, counted = torch_private.stop_memory_profiler()
        self._begin_ns = None  # only now: after a fault on the way here, abandon() must still end the recording
        complete = sum(events.deltas) == counted
        return Window(begin_ns=begin_ns, end_ns=end_ns, events=events, live_at_begin=None, complete=complete)

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""
        if self.is_open:
            self.close()

    def reading(self) -> AllocatorReading | None:
        """Returns None: the CPU allocator has no counters."""
        return None

"""CPU allocator events of all threads.

torch's memory events belong to the thread that allocates or frees. Gloo runs collectives on threads of its own, and
drops its references to their tensors an instant after the caller's wait has returned: now and then its reference is the
last one, and torch reports no free. A preloaded `free()` (foreign_frees.c) notes those. On a GPU the allocator's
history sees all threads, and none of this matters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace

from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Event, Events, Window


class _ForeignFree(ctypes.Structure):
    _fields_ = (("time_ns", ctypes.c_int64), ("address", ctypes.c_uint64))


class AllThreadsEvents(CpuEvents):
    """The events of torch's profiler, with the frees of other threads among them."""

    def __init__(self) -> None:
        super().__init__()
        library = ctypes.CDLL(None)
        library.foreign_free_count.restype = ctypes.c_uint64
        library.foreign_frees.restype = ctypes.POINTER(_ForeignFree)
        self._library = library
        self._first = 0

    def open(self) -> bool:
        """Begins a window."""
        self._first = self._library.foreign_free_count()
        return super().open()

    def close(self) -> Window:
        """Ends the window."""
        window = super().close()
        noted = self._library.foreign_frees()
        frees = [(noted[i].time_ns, noted[i].address) for i in range(self._first, self._library.foreign_free_count())]
        return replace(window, events=Events.of(_merge(window.events, frees)))


def _merge(events: Iterable[Event], frees: list[tuple[int, int]]) -> list[Event]:
    """Puts a free between the allocation of its block and whatever comes next at that address."""
    rows = [(event.time_ns, event) for event in events]
    rows += [(time_ns, Event(time_ns, address, 0)) for time_ns, address in frees]
    live: dict[int, int] = {}
    merged = []
    for _, event in sorted(rows, key=lambda row: row[0]):
        if event.delta > 0:
            live[event.address] = event.delta
            merged.append(event)
            continue
        size = live.pop(event.address, None)
        if event.delta < 0:
            merged.append(event)
        elif size is not None:
            merged.append(Event(event.time_ns, event.address, -size))
    return merged

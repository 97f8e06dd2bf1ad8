"""Allocator events and counters of one CUDA device, from the caching allocator's own history.

The history is recorded without stacks. Sizes are as requested: the allocator rounds each block up, and that rounding
is part of its slack (`AllocatorReading.allocated_bytes` is rounded, `requested_bytes` is not).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from memtrace.breakdown import AllocatorReading
from memtrace.errors import LogFormatError
from memtrace.sources import torch_private
from memtrace.sources.events import Block, Event, Events, Window

MAX_EVENTS = 400_000
"""Size of the history ring, in events; torch's default is unbounded. An entry without a stack takes about 100 B."""

_LIVE_STATES = frozenset({"active_allocated", "active_awaiting_free", "active_pending_free"})


class CudaEvents:
    """Records what the caching allocator of one device does, and reads its counters.

    Where the user records a history already, theirs is read and neither stopped nor cleared. Never allocates on the
    device and never synchronises it.
    """

    def __init__(self, device_index: int, max_events: int = MAX_EVENTS) -> None:
        self._device_index = device_index
        self._max_events = max_events
        self._begin_ns: int | None = None
        self._live_at_begin: Sequence[Block] = ()
        self._owns_history = False

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._begin_ns is not None

    def open(self) -> bool:
        """Begins a window; False where torch cannot tell whether the user records, or one is open."""
        recording = torch_private.memory_history_is_recording()
        if self.is_open or recording is None:
            return False
        self._owns_history = not recording
        if self._owns_history:
            torch_private.record_memory_history(self._max_events)
        self._live_at_begin = tuple(live_blocks(segments(), self._device_index))
        self._begin_ns = time.time_ns()
        return True

    def interrupted(self) -> bool:
        """Returns False: a history can be read by several readers at once."""
        return False

    def close(self) -> Window:
        """Ends the window; `complete` is False where the history does not lead to the blocks that are live now."""
        assert self._begin_ns is not None, "close() without open()"
        begin_ns, self._begin_ns = self._begin_ns, None
        snapshot = torch_private.memory_snapshot_with_history()
        if self._owns_history:
            torch_private.stop_memory_history()
        window = parse_window(snapshot, self._device_index, begin_ns, time.time_ns(), self._live_at_begin)
        self._live_at_begin = ()
        return window

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""
        if self.is_open and self._owns_history:
            torch_private.stop_memory_history()
        self._begin_ns, self._live_at_begin = None, ()

    def reading(self) -> AllocatorReading | None:
        """Returns the allocator's counters; None before torch has initialised CUDA in this process."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        return parse_counters(torch.cuda.memory.memory_stats_as_nested_dict(self._device_index))


def segments() -> object:
    """Returns the segments of all devices and their blocks, without the history where torch can leave it out.

    Neither allocates on a device nor synchronises one.
    """
    snapshot = torch.cuda.memory_snapshot
    lean = "include_traces" in inspect.signature(snapshot).parameters
    return snapshot(include_traces=False) if lean else snapshot()  # type: ignore[no-untyped-call]


def parse_counters(stats: Mapping[str, Any]) -> AllocatorReading | None:
    """Returns the counters in `torch.cuda.memory.memory_stats_as_nested_dict()`; None where the basic ones are absent.

    Fields come and go between versions of torch: each one that is absent, or has another form, is None.
    """

    def current(group: str, value: str = "current") -> int | None:
        found: object = stats
        for name in (group, "all", value):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, int) else None

    def plain(name: str) -> int | None:
        found = stats.get(name)
        return found if isinstance(found, int) else None

    allocated, reserved = current("allocated_bytes"), current("reserved_bytes")
    if allocated is None or reserved is None:
        return None
    return AllocatorReading(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        requested_bytes=current("requested_bytes"),
        peak_allocated_bytes=current("allocated_bytes", "peak"),
        peak_requested_bytes=current("requested_bytes", "peak"),
        inactive_split_bytes=current("inactive_split_bytes"),
        retries=plain("num_alloc_retries"),
        ooms=plain("num_ooms"),
    )


def parse_window(
    snapshot: Mapping[str, Any], device_index: int, begin_ns: int, end_ns: int, live_at_begin: Sequence[Block]
) -> Window:
    """Returns the window that a snapshot with history describes.

    The history must lead from the blocks live at the beginning to those live in the snapshot; where it does not,
    events were lost and `complete` is False.

    Raises:
        LogFormatError: this is not a snapshot.
    """
    traces = snapshot.get("device_traces") if isinstance(snapshot, Mapping) else None
    if not isinstance(traces, Sequence):
        raise LogFormatError("a CUDA snapshot must have a list 'device_traces', got none: is it from _snapshot()?")
    history = traces[device_index] if device_index < len(traces) else ()
    events = Events.of(_parse_history(history, begin_ns))
    live = {block.address: block.nbytes for block in live_at_begin}
    for _, address, delta in events.rows():
        if delta > 0:
            live[address] = delta
        else:
            live.pop(address, None)
    now = {block.address: block.nbytes for block in live_blocks(snapshot.get("segments", ()), device_index)}
    return Window(
        begin_ns=begin_ns,
        end_ns=end_ns,
        events=events,
        live_at_begin=tuple(live_at_begin),
        resolution_ns=1000,
        complete=live == now,
    )


def _parse_history(history: object, begin_ns: int) -> Iterator[Event]:
    """Yields allocations and completed frees since `begin_ns`; a free that waits for another stream is still live."""
    for entry in history if isinstance(history, Sequence) else ():
        if not isinstance(entry, Mapping):
            continue
        time_us, address, size = entry.get("time_us"), entry.get("addr"), entry.get("size")
        if not (isinstance(time_us, int) and isinstance(address, int) and isinstance(size, int)) or size <= 0:
            continue
        if (time_us + 1) * 1000 <= begin_ns:
            continue
        if entry.get("action") == "alloc":
            yield Event(time_us * 1000, address, size)
        elif entry.get("action") == "free_completed":
            yield Event(time_us * 1000, address, -size)


def live_blocks(segments: object, device_index: int) -> Iterator[Block]:
    """Yields the blocks in use on one device, with their requested sizes, from a snapshot's segments.

    Blocks that wait for another stream before they can be reused are in use.
    """
    for segment in segments if isinstance(segments, Sequence) else ():
        if not isinstance(segment, Mapping) or segment.get("device", device_index) != device_index:
            continue
        address, blocks = segment.get("address", 0), segment.get("blocks")
        for block in blocks if isinstance(blocks, Sequence) else ():
            if not isinstance(block, Mapping):
                continue
            size, at, state = block.get("size", 0), block.get("address", address), block.get("state")
            if not (isinstance(size, int) and isinstance(at, int)):
                continue
            requested = block.get("requested_size", size)
            if isinstance(state, str) and state in _LIVE_STATES and isinstance(requested, int):
                yield Block(at, requested)
            address = at + size

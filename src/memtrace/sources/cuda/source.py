"""Allocator events and counters of one CUDA device, from the caching allocator's own history.

The history is recorded without stacks. Sizes are as requested: the allocator rounds each block up, and that rounding
is part of its slack (`AllocatorReading.allocated_bytes` is rounded, `requested_bytes` is not).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.record.readings.annotation import annotation
from memtrace.sources import recording_torch_private
from memtrace.sources.cuda.allocator import (
    PrivatePools,
    allocations_of,
    allowed_bytes,
    counters,
    live_blocks,
    parse_counters,
    segments,
)
from memtrace.sources.cuda.history import Beginning, history_of, mark_beginning, parse_window
from memtrace.sources.events import Block, TagEvent, Window

logger = logging.getLogger("memtrace")

MAX_EVENTS = 1_000_000
"""Entries of the largest ring. One takes about 140 B in the ring, and 700 B more while it is read back."""

DEFAULT_EVENTS = 400_000
"""Entries of the ring where nobody knows what a step allocates."""

SPARE_EVENTS = 10_000
"""Entries beside those of allocations: segments, marks, and what other threads allocate."""

SPARE_RATIO = 1.25
"""How many times the allocations that were expected a step may make."""

MAX_FOREIGN_EVENTS = 400_000
"""Entries up to which a history of the user's is read: torch copies all of it, whatever the window is."""

_NO_HISTORY = "on this device: its allocator keeps no history that torch lets us read (only the native backend does)"
_STACKS = "while the allocator's history is recorded with stacks, which each trace would copy: context=None has none"
_LARGE = f"while a history of the allocator is recorded that may have more than {MAX_FOREIGN_EVENTS:,} entries"
_NO_EVENTS = "while the allocator's history is recorded without events (enabled='state')"
_NO_ANNOTATIONS = "memtrace: no snapshot is annotated: torch %s cannot (from 2.14 on it can, with its native allocator)"


class CudaEvents:
    """Records what the caching allocator of one device does, and reads its counters.

    Where the user records a history already, theirs is read and neither stopped nor cleared. There are no windows while
    one is recorded that has stacks or may have more than `MAX_FOREIGN_EVENTS` entries, since each reading would copy
    all of it, or that has no events (`enabled="state"`). Where the user starts one inside a window, it goes on. That is
    told by stacks, by actions that memtrace leaves out, or by a ring of another size: one that is the same in all of
    these cannot be told, and ends with the window.

    Never allocates on the device and never synchronises it. An allocator that keeps no history has no windows.
    """

    def __init__(self, device_index: int, max_events: int = MAX_EVENTS) -> None:
        self._device_index = device_index
        self._max_events = max_events
        self._pools = PrivatePools(device_index)
        self._begin_ns: int | None = None
        self._beginning: Beginning | None = None
        self._live_at_begin: Sequence[Block] = ()
        self._owns_history = False
        self._ring = 0
        """Entries of our own ring."""
        self._left_out: frozenset[str] = frozenset()
        """Actions that our own history leaves out."""
        self._refused = False
        """Whether the user's history is left alone, which holds until it ends."""
        self._allocations_before = 0
        """The allocator's count when nobody was last seen to record: a history has begun since."""
        self._said: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._begin_ns is not None

    def open(self, expected_allocations: int | None = None) -> bool:
        """Begins a window; False where one is open, and where no history can be had.

        Args:
            expected_allocations: what the step is expected to allocate, for the size of the ring. None: nobody knows.
        """
        if self.is_open:
            return False
        recording = recording_torch_private.memory_history_is_recording()
        if recording is None:
            return self._say(_NO_HISTORY)
        if not (self._joins_theirs() if recording else self._begins_ours(expected_allocations)):
            return False
        self._begin_ns = time.time_ns()  # from here on abandon() has something to end
        self._beginning = mark_beginning(empty=not recording)
        listed = segments()
        if listed is None or (recording and _have_stacks(_blocks(listed))):
            self.abandon()
            return self._say(_NO_HISTORY) if listed is None else self._refuse(_STACKS)
        self._pools.listed(listed)
        self._live_at_begin = live_blocks(listed, self._device_index)
        self._begin_ns = time.time_ns()
        return True

    def fits(self, allocations: int) -> bool:
        """Returns whether the ring holds a step of so many allocations."""
        return self._needed(allocations) <= self._max_events

    def interrupted(self) -> bool:
        """Returns False: a history can be read by several readers at once."""
        return False

    def hears_this_thread(self) -> bool:
        """Returns True: a history has the events of all threads."""
        return True

    def close(self) -> Window:
        """Ends the window; `complete` is False where the history does not lead to the blocks that are live now."""
        assert self._begin_ns is not None, "close() without open()"
        begin_ns = self._begin_ns
        recording = recording_torch_private.memory_history_is_recording()
        snapshot = recording_torch_private.memory_snapshot_with_history()
        end_ns = time.time_ns()
        history = history_of(snapshot, self._device_index)
        if recording and self._owns_history and self._is_ours(history):
            recording_torch_private.stop_memory_history()
        beginning, live_at_begin = self._beginning, self._live_at_begin
        self._begin_ns, self._live_at_begin = None, ()  # only now: after a fault on the way here abandon() must end it
        window = parse_window(snapshot, self._device_index, begin_ns, end_ns, live_at_begin, beginning=beginning)
        if not recording:  # the user has ended it
            return replace(window, complete=False)
        if not self._owns_history:
            self._look_at_theirs(history)
            return replace(window, complete=False) if len(history) <= 1 else window
        return replace(window, complete=False) if len(history) >= self._ring else window

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""
        if self.is_open and self._owns_history and recording_torch_private.memory_history_is_recording():
            snapshot = recording_torch_private.memory_snapshot_with_history()
            if self._is_ours(history_of(snapshot, self._device_index)):
                recording_torch_private.stop_memory_history()
        self._begin_ns, self._live_at_begin = None, ()

    def reading(self) -> AllocatorReading | None:
        """Returns the allocator's counters; None before torch has initialised CUDA in this process."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        stats = counters(self._device_index)
        return parse_counters(
            stats,
            private_pool_bytes=self._pools.unused_bytes(stats),
            allowed_bytes=allowed_bytes(self._device_index),
        )

    def user_records(self) -> bool:
        """Returns whether a history is recorded that memtrace has not begun."""
        ours = self.is_open and self._owns_history
        return not ours and bool(recording_torch_private.memory_history_is_recording())

    def annotate(self, tags: Iterable[TagEvent]) -> None:
        """Writes an entry with category, component and element type for each tag; says once where torch cannot."""
        for _, address, _, tag in tags:
            if tag is not None and not recording_torch_private.annotate_memory(address, annotation(*tag)):
                if _NO_ANNOTATIONS not in self._said:
                    self._said.add(_NO_ANNOTATIONS)
                    logger.warning(_NO_ANNOTATIONS, torch.__version__)
                return

    def _needed(self, allocations: int) -> int:
        """Returns the entries that a step of so many allocations writes."""
        each = 2 if recording_torch_private.skips_requested_frees() else 3
        return int(SPARE_RATIO * each * allocations) + SPARE_EVENTS

    def _entries(self, allocations: int | None) -> int:
        """Returns the size of a ring, which takes memory only as it fills."""
        return min(self._max_events, max(DEFAULT_EVENTS, 0 if allocations is None else self._needed(allocations)))

    def _is_ours(self, history: Sequence[Any]) -> bool:
        """Whether the history is still the one that this window has begun, and not one that the user has since."""
        actions = {entry.get("action") for entry in history if isinstance(entry, Mapping)}
        began_here = len(history) >= self._ring or "snapshot" in actions or not history
        return began_here and len(history) <= self._ring and not actions & self._left_out and not _have_stacks(history)

    def _begins_ours(self, expected_allocations: int | None) -> bool:
        self._owns_history, self._refused = True, False
        self._allocations_before = allocations_of(counters(self._device_index)) or 0
        self._ring = self._entries(expected_allocations)
        left_out = recording_torch_private.record_memory_history(self._ring)
        if left_out is None:
            return self._say(_NO_HISTORY)
        self._left_out = left_out
        return True

    def _joins_theirs(self) -> bool:
        """Whether the user's history can be read: it must be known to be short enough to be copied."""
        self._owns_history = False
        if self._refused:
            return False
        allocations = allocations_of(counters(self._device_index))
        short = allocations is not None and 3 * (allocations - self._allocations_before) <= MAX_FOREIGN_EVENTS
        return short or self._refuse(_LARGE)

    def _look_at_theirs(self, history: Sequence[Any]) -> None:
        """Decides from a user's history that was read whether it is read again."""
        if len(history) <= 1:
            self._refuse(_NO_EVENTS)
        elif _have_stacks(history):
            self._refuse(_STACKS)
        elif len(history) > MAX_FOREIGN_EVENTS:
            self._refuse(_LARGE)

    def _refuse(self, reason: str) -> bool:
        """Leaves the user's history alone until it ends."""
        self._refused = True
        return self._say(reason)

    def _say(self, reason: str) -> bool:
        """Says once why there is no window."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("memtrace: no step is traced %s", reason)
        return False


def _blocks(listed: Sequence[Any]) -> Iterator[Any]:
    for segment in listed:
        yield from segment.get("blocks", ())


def _have_stacks(entries: Iterable[Any]) -> bool:
    return any(isinstance(entry, Mapping) and entry.get("frames") for entry in entries)

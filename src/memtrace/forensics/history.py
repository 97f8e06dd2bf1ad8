"""What the history of one device says: the life of each block, what was reserved, and where requests failed.

A ring keeps the newest entries only. What was there before is found backwards: blocks that are in use at the end and
were never allocated in it, and blocks that it frees without an allocation.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

from memtrace.attribution.timeline import Lifetime, Timeline, replay
from memtrace.forensics.snapshot import AllocatorSnapshot, Segment
from memtrace.forensics.trace import UNKNOWN, Trace
from memtrace.sources.events import Block, Events, Window

MAX_REPLAYED = 1_000_000
"""Entries of one device that are replayed, the newest ones. Each takes up to about 500 bytes meanwhile, beside what the
whole file holds: with 16 million entries in columns, 1.5 GB were measured."""

_GROWS, _SHRINKS = frozenset({"segment_alloc", "segment_map"}), frozenset({"segment_free", "segment_unmap"})


class Failure(NamedTuple):
    """A request that the allocator could not serve."""

    position: int
    """Changes before it."""
    requested: int
    """Bytes."""
    device_free: int | None
    """Bytes that the device had free."""
    stack: int


class Note(NamedTuple):
    """What somebody has written on a block that was in use."""

    position: int
    address: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The blocks of one device, from before its first entry to the snapshot. Positions count changes, from 0."""

    device: int
    timeline: Timeline
    """Its lifetimes in the order of their begin, those from before the history first."""
    stacks: Sequence[int]
    """Where each of the lifetimes was allocated, as an index into the stacks of the snapshot; -1 where nobody knows."""
    rows: Sequence[int]
    """Which entry of the history allocated each of the lifetimes; below 0, and unique, for those from before it."""
    notes: Sequence[Note]
    """What was written on blocks, when they were allocated or later."""
    reserved: Sequence[int]
    """Bytes in segments before the first change, then after each one."""
    failures: Sequence[Failure]
    segments: Sequence[Segment]
    recorded: bool
    """Whether there is a history at all; without one, only the blocks at the end are known."""
    left_out: int
    """Entries that are older than those that were replayed."""
    complete: bool
    """Whether the history leads to the blocks that the segments list."""

    @property
    def end(self) -> int:
        """The position of the snapshot."""
        return len(self.timeline.change_ns)

    @property
    def peak(self) -> int:
        """The first position at which most was allocated."""
        totals = self.timeline.totals
        return totals.index(max(totals))

    def top(self, begin: int, end: int) -> int:
        """Returns the first position of a stretch at which most was allocated."""
        return max(range(begin, max(begin, end) + 1), key=self.timeline.totals.__getitem__)

    def live(self, position: int, since: int | None = None) -> Iterator[int]:
        """Yields the indices of the lifetimes that are there at a position, of all or of those since another position.

        Looks at no lifetime that begins before that one.
        """
        lifetimes = self.timeline.lifetimes
        first = 0 if since is None else bisect_left(lifetimes, since, key=attrgetter("begin"))
        for index in range(first, len(lifetimes)):
            life = lifetimes[index]
            if life.begin >= position:
                return
            if life.end is None or life.end >= position:
                yield index


def read_history(snapshot: AllocatorSnapshot, device: int) -> History:
    """Returns what is known of one device."""
    trace, segments = snapshot.trace(device), snapshot.segments_of(device)
    left_out = max(0, len(trace) - MAX_REPLAYED)
    listed = {block.address: block for segment in segments for block in segment.blocks if block.live}
    changes = _changes(trace, left_out)
    before = {address: size for address, size, _ in changes.older}
    for address, block in listed.items():
        if address not in changes.live and address not in changes.touched:
            before[address] = block.requested
    window = Window(
        begin_ns=changes.times_ns[0] if changes.times_ns else 0,
        end_ns=changes.times_ns[-1] if changes.times_ns else 0,
        events=Events(changes.times_ns, changes.addresses, changes.deltas),
        live_at_begin=[Block(address, size) for address, size in before.items()],
    )
    timeline = replay(window, (), ())
    reserved_at_end = sum(segment.size for segment in segments)
    known = {address: block.stack for address, block in listed.items()}
    ends = {life.address for life in timeline.lifetimes if life.end is None}
    return History(
        device=device,
        timeline=timeline,
        stacks=_stacks(timeline.lifetimes, changes, trace, known),
        rows=_rows(timeline.lifetimes, changes),
        notes=changes.notes,
        reserved=_reserved(changes, reserved_at_end),
        failures=changes.failures,
        segments=segments,
        recorded=len(trace) > 0,
        left_out=left_out,
        complete=not segments or ends == set(listed),
    )


class _Changes:
    """The changes of a history, cleaned of what cannot be: each allocation is of an address that is free."""

    def __init__(self) -> None:
        self.times_ns, self.addresses, self.deltas, self.rows = array("q"), array("q"), array("q"), array("q")
        self.live: dict[int, int] = {}
        """Blocks that the history has allocated and not freed, with their sizes."""
        self.touched: set[int] = set()
        """Addresses whose first entry is a free: they were in use before."""
        self.older: list[tuple[int, int, int]] = []
        self.notes: list[Note] = []
        self.failures: list[Failure] = []
        self.segment_changes: list[tuple[int, int]] = []
        """Position and bytes of each change of the segments."""

    def add(self, time_us: int, address: int, delta: int, row: int) -> None:
        self.times_ns.append(max(time_us, 0) * 1000)
        self.addresses.append(address)
        self.deltas.append(delta)
        self.rows.append(row)

    def allocate(self, time_us: int, address: int, size: int, row: int) -> None:
        lost = self.live.pop(address, None)
        if lost is not None:  # its free was not recorded
            self.add(time_us, address, -lost, row)
        self.live[address] = size
        self.add(time_us, address, size, row)

    def free(self, time_us: int, address: int, size: int, row: int) -> None:
        known = self.live.pop(address, None)
        if known is None:
            if address in self.touched or not size:
                return  # freed twice: its allocation was not recorded
            self.touched.add(address)
            self.older.append((address, size, row))
        self.add(time_us, address, -(known or size), row)


def _changes(trace: Trace, first: int) -> _Changes:
    found = _Changes()
    free = "free_completed" if "free_completed" in trace.words else "free_requested"
    allocated: set[int] = set()
    for row, entry in enumerate(trace.entries(first), first):
        action, address, size = entry.action, entry.address, entry.size
        if action == "alloc":
            if not size:
                continue
            if address not in found.live and address not in allocated:
                allocated.add(address)
                found.touched.add(address)
            found.allocate(entry.time_us, address, size, row)
        elif action == free:
            found.free(entry.time_us, address, size, row)
        elif action in _GROWS:
            found.segment_changes.append((len(found.deltas), size))
        elif action in _SHRINKS:
            found.segment_changes.append((len(found.deltas), -size))
        elif action == "oom":
            device_free = None if entry.device_free == UNKNOWN else entry.device_free
            found.failures.append(Failure(len(found.deltas), max(size, 0), device_free, entry.stack))
        if action in ("alloc", "annotate"):
            texts = (entry.category, entry.note)  # a note says more than a category
            found.notes += [Note(len(found.deltas), address, text) for text in texts if text]
    return found


def _stacks(lifetimes: Sequence[Lifetime], changes: _Changes, trace: Trace, known: dict[int, int]) -> Sequence[int]:
    """Returns the stack of each lifetime's allocation; of an older block the one that the segments list."""
    stacks = array("q")
    for life in lifetimes:
        if life.begin >= 0:
            stacks.append(trace.stacks[changes.rows[life.begin]])
        else:
            stacks.append(known.get(life.address, UNKNOWN) if life.end is None else UNKNOWN)
    return stacks


def _rows(lifetimes: Sequence[Lifetime], changes: _Changes) -> Sequence[int]:
    return array(
        "q", [changes.rows[life.begin] if life.begin >= 0 else -index - 1 for index, life in enumerate(lifetimes)]
    )


def _reserved(changes: _Changes, at_end: int) -> Sequence[int]:
    """Returns what was reserved at each position, counted backwards from the end."""
    deltas = [0] * (len(changes.deltas) + 1)
    for position, nbytes in changes.segment_changes:
        deltas[position] += nbytes
    begin = at_end - sum(deltas)
    totals = [*accumulate(deltas, initial=begin)][1:]
    lowest = min(totals)
    return totals if lowest >= 0 else [total - lowest for total in totals]

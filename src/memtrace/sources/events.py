"""The types that all sources share: what the allocator did, and what is known of an address.

These are the two streams that `attribution.timeline` joins. A step has tens of thousands of either: events are kept in
columns, tags are tuples. Times are nanoseconds of one clock and addresses name storages, both as `Coordinates` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, Self, overload

import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Category


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """How events name an instant and a storage: tags must name them in the same way. The defaults are a device's."""

    now_ns: Callable[[], int] = time.time_ns
    """Nanoseconds of the clock of the events."""
    address_of: Callable[[torch.UntypedStorage], int] = torch.UntypedStorage.data_ptr
    """The address by which the events know a storage; no two live storages have the same."""


MEMORY = Coordinates()
"""Of storages that hold memory."""


class Event(NamedTuple):
    """One allocation or free."""

    time_ns: int
    address: int
    delta: int
    """Bytes: positive for an allocation, negative for a free."""


@dataclass(frozen=True, slots=True)
class Events(Sequence[Event]):
    """Allocations and frees in the order in which the allocator did them.

    Each field is a column with one number for each of them, and is what a replay reads: it takes longer to make the
    rows than to go through them.
    """

    times_ns: Sequence[int] = ()
    addresses: Sequence[int] = ()
    deltas: Sequence[int] = ()

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        """Returns these events, column by column."""
        return cls(*zip(*events, strict=True))

    def __len__(self) -> int:
        return len(self.times_ns)

    def __iter__(self) -> Iterator[Event]:
        return map(Event._make, self.rows())

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Event | Self:
        columns = self.times_ns, self.addresses, self.deltas
        if isinstance(index, slice):
            return type(self)(*(column[index] for column in columns))
        return Event(*(column[index] for column in columns))

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Returns each event as a plain tuple: what is quickest to go through."""
        return zip(self.times_ns, self.addresses, self.deltas, strict=True)


class Tag(NamedTuple):
    """What a storage is for."""

    category: Category
    component: str
    dtype: str


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of an element type without `torch.`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


class _RoleTags(dict[torch.dtype, Tag]):
    def __init__(self, category: Category, component: str) -> None:
        self._role = category, component

    def __missing__(self, dtype: torch.dtype) -> Tag:
        self[dtype] = tag = Tag(*self._role, dtype_name(dtype))
        return tag


tags_of = cache(_RoleTags)
"""Returns the one `Tag` of a category and a component for each element type that it is asked for.

A run has a handful of tags, and puts them on thousands of storages.
"""


class TagEvent(NamedTuple):
    """At this time the block at this address was known to be for this, or was known to have died."""

    time_ns: int
    address: int
    nbytes: int
    tag: Tag | None
    """None: the storage that the ledger knew at this address died."""


class Block(NamedTuple):
    """A block that was live when a window of events began."""

    address: int
    nbytes: int


class StreamMemory(NamedTuple):
    """Memory that an allocator gives to work on one stream of a device only."""

    begin: int
    end: int
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What an allocator did between two instants."""

    begin_ns: int
    end_ns: int
    events: Events
    live_at_begin: Sequence[Block] | None
    """Every block that was live at the beginning; None where the source cannot list them (a CPU)."""
    resolution_ns: int = 1
    """How far the time of an event may lie before the instant that it stands for."""
    streams: Sequence[StreamMemory] = ()
    """By address, where memory is for more than one stream; empty where it is not, and where nobody tells."""
    complete: bool = True
    """False where the source lost events, for instance because its ring buffer was too small."""


class EventSource(Protocol):
    """Records what the allocator of one device does, for as long as a window is open."""

    def open(self, expected_allocations: int | None = None) -> bool:
        """Begins a window. Returns False, and does nothing, where recording is not possible now.

        Args:
            expected_allocations: what the step is expected to allocate, for a source that must have room for it. None:
                nobody knows.
        """

    def fits(self, allocations: int) -> bool:
        """Returns whether the source has room for a step of so many allocations."""

    def close(self) -> Window:
        """Ends the window and returns what happened in it."""

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""

    def interrupted(self) -> bool:
        """Whether somebody else's recorder needs the window to end now."""

    def hears_this_thread(self) -> bool:
        """Whether the open window has what the calling thread allocates and frees."""

    def reading(self) -> AllocatorReading | None:
        """Returns the allocator's counters now; None for an allocator without counters (a CPU)."""


class Annotator(Protocol):
    """Writes what blocks are for into a history of the allocator that the user records."""

    def user_records(self) -> bool:
        """Whether the user records one now."""

    def annotate(self, tags: Iterable[TagEvent]) -> None:
        """Writes the tag of each block that is live at an address."""

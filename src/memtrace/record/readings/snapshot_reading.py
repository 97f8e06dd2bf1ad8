"""What was read out of an allocator's snapshot: plain data that tables, pages and JSON show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from memtrace.record.breakdown import StepCurve, totals_by_category
from memtrace.record.categories import Category
from memtrace.record.oom.report import Fragmentation, Remedy


class Source(StrEnum):
    """How it is known what a block is for. In falling order of trust."""

    ANNOTATION = "annotation"
    """Somebody has written it on the block: memtrace, or the user's metadata."""
    RUN = "run"
    """A memtrace run of the same process has counted it at that moment, or its sums leave no choice."""
    SIZE = "size"
    """Its size is that of a parameter of the model that was given, and it lives as such a block does."""
    STACK = "stack"
    """Of the code that allocated it."""
    LIFE = "life"
    """From when it was allocated and freed within a step."""
    NONE = "none"
    """Nobody knows."""


class SnapshotMoment(StrEnum):
    """An instant of a history at which it is told what memory was for."""

    PEAK = "peak"
    END = "end"
    FAILURE = "failure"
    """When the last request failed."""


class ReadKey(NamedTuple):
    """What the bytes of one entry have in common."""

    category: Category
    component: str
    dtype: str
    """Empty where it is not known."""
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBreakdown:
    """What memory was for at one moment."""

    moment: SnapshotMoment
    entries: Mapping[ReadKey, int]
    """Bytes as requested, in the order of `Category`."""
    reserved_bytes: int
    """What the allocator held of the device."""
    seconds: float | None = None
    """Since the first entry of the history; None where it has no times."""

    @property
    def total_bytes(self) -> int:
        """Sum of all entries: what was allocated."""
        return sum(self.entries.values())

    def by_category(self) -> dict[Category, int]:
        """Bytes of each category that has any, in the order of `Category`."""
        return totals_by_category(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadHolder:
    """Blocks of one category that were allocated at one place, or have one size where no places were recorded."""

    category: Category
    place: str
    """File, line and function; empty where no stacks were recorded."""
    blocks: int
    nbytes: int
    """Of all of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailure:
    """The last request that the allocator could not serve."""

    requested_bytes: int
    free_bytes: int | None
    """What the device had free; None where the snapshot does not say."""
    place: str
    """Where it was made; empty where no stacks were recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """What a snapshot says of one device."""

    device: int
    moments: Mapping[SnapshotMoment, ReadBreakdown]
    holders: Sequence[ReadHolder]
    """The largest at the failure, else at the peak."""
    fragmentation: Fragmentation
    """Of the memory that is free at the end."""
    events: int
    """Allocations and frees that the history has."""
    steps: int
    """Steps that were found in it."""
    failure: ReadFailure | None = None
    remedies: Sequence[Remedy] = ()
    curve: StepCurve | None = None
    """What was allocated over the history, by category; None where there is no history."""
    notes: Sequence[str] = ()
    """What limits what was read, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReading:
    """What one snapshot says."""

    name: str
    """Of the file."""
    devices: Sequence[DeviceReading]
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of the allocator."""

"""Two runs held against each other: their steps of equal shape, category by category."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from memtrace.record.breakdown import BatchShape, Breakdown, StepRecord
from memtrace.record.categories import Category, Moment

ByShape = Mapping[BatchShape | None, StepRecord]
"""One record for each shape of the batch; None is the shape of batches that were not seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One category, or a total, in the first and in the second run; bytes."""

    category: Category | None
    """None for the total."""
    first: int
    second: int

    @property
    def nbytes(self) -> int:
        """Second minus first: above 0 where it grew."""
        return self.second - self.first

    @property
    def ratio(self) -> float | None:
        """The growth as a share of the first; None where that has nothing."""
        return self.nbytes / self.first if self.first else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPair:
    """A step of each run, of one rank and, unless they were named, of equal shape. Both know their peak."""

    first: StepRecord
    second: StepRecord

    @property
    def peak(self) -> Growth:
        """What was allocated at the peak, by the allocator's own count where there is one."""
        held = [record.moments[Moment.PEAK].held_bytes for record in (self.first, self.second)]
        return Growth(category=None, first=held[0], second=held[1])

    @property
    def estimated(self) -> bool:
        """Whether the categories of one of the peaks were not traced."""
        return any(record.moments[Moment.PEAK].estimated for record in (self.first, self.second))

    def moments(self) -> Mapping[Moment, list[Growth]]:
        """Returns the growth of each category at each moment that both know, the total last."""
        first, second = self.first.moments, self.second.moments
        return {moment: _growth(first[moment], second[moment]) for moment in Moment if {moment} <= {*first} & {*second}}


def by_shape(records: Iterable[StepRecord]) -> ByShape:
    """Returns the newest record with a peak for each shape of the batch, a traced one before others.

    Shapes that occurred only before the optimizer had state are left out where it got some: such a step is another.
    """
    found: dict[BatchShape | None, StepRecord] = {}
    has_state = False
    for record in records:
        if Moment.PEAK not in record.moments:
            continue
        before = found.get(record.batch)
        has_state |= _has_state(record)
        if before is None or record.traced or not before.traced or (_has_state(record) and not _has_state(before)):
            found[record.batch] = record
    return {shape: record for shape, record in found.items() if _has_state(record) or not has_state}


def pairs(first: Mapping[int, ByShape], second: Mapping[int, ByShape]) -> list[StepPair]:
    """Returns the steps of equal rank and shape of two runs, the one whose peak grew most first.

    Args:
        first: the records of one run, by rank: see `by_shape`.
        second: those of the other.
    """
    found = [
        StepPair(first=record, second=second[rank][shape])
        for rank, records in first.items()
        for shape, record in records.items()
        if shape in second.get(rank, ())
    ]
    return sorted(found, key=lambda pair: (-pair.peak.nbytes, -pair.peak.second, pair.first.rank))


def shapes(records: Mapping[int, ByShape]) -> Iterator[str]:
    """Yields the shapes of a run's batches, for people, each once."""
    seen = {shape: None for each in records.values() for shape in each}
    for shape in seen:
        yield "not seen" if shape is None else " x ".join(map(str, shape.shape))


def _has_state(record: StepRecord) -> bool:
    return any(found[Category.OPTIMIZER_STATE] for found in record.moments.values()) or bool(record.host)


def _growth(first: Breakdown, second: Breakdown) -> list[Growth]:
    sizes = first.by_category(), second.by_category()
    rows = [
        Growth(category=category, first=sizes[0].get(category, 0), second=sizes[1].get(category, 0))
        for category in Category
        if any(category in known for known in sizes)
    ]
    return [*rows, Growth(category=None, first=first.total_bytes, second=second.total_bytes)]

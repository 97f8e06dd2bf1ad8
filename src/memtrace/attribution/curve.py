"""A step as a curve: what was allocated, by category, at many points of it instead of at four moments."""

from __future__ import annotations

from memtrace.allocator.recording import AllocatorRecording
from memtrace.attribution.recording import step_recording
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.record.breakdown import StepCurve, StepRecord
from memtrace.record.categories import Category, Moment

MAX_STRETCHES = 160
"""Stretches that the changes of a step are cut into, each with one point: a picture has no more columns to show."""

RECORDED = "cuda"
"""How devices are named whose allocator is recorded: others have no settings to choose from."""


class HighestSteps:
    """Makes a curve of a step only where its peak is above that of every one before: a steady run makes no more.

    On a CUDA device it keeps the recording of the last such step, for when memory runs out and for the file.

    Args:
        every: whether every step has a curve.
    """

    def __init__(self, *, every: bool = False) -> None:
        self._every = every
        self._highest = 0
        self._waiting: tuple[Timeline, StepMarks] | None = None
        """Of the step that has just made a curve, until its record is there."""
        self.recording: AllocatorRecording | None = None
        """Of the highest step so far; None on a CPU, and where a step allocates too often."""

    def curve(self, timeline: Timeline, marks: StepMarks) -> StepCurve | None:
        """Returns the curve of a step that sets a new record, or of every one; None for others."""
        peak = timeline.totals[timeline.positions(marks)[Moment.PEAK]]
        if peak <= self._highest and not self._every:
            return None
        if peak > self._highest:
            self._highest = peak
            self._waiting = timeline, marks
        return step_curve(timeline, marks)

    def ended(self, record: StepRecord) -> None:
        """Takes in the record of a step that has ended."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and record.device.startswith(RECORDED):
            self.recording = step_recording(*waiting, record) or self.recording


def step_curve(timeline: Timeline, marks: StepMarks) -> StepCurve:
    """Returns the curve of one step.

    Takes time in proportion to the blocks of the window, about as much as two moments of `Timeline.moments()`.
    """
    positions = _positions(timeline, marks)
    return StepCurve(
        seconds=[_seconds(timeline, marks, position) for position in positions],
        by_category=_by_category(timeline, marks, positions),
        moments={moment: _seconds(timeline, marks, position) for moment, position in timeline.positions(marks).items()},
    )


def _positions(timeline: Timeline, marks: StepMarks) -> list[int]:
    """Returns the begin, every moment, and of each stretch the position at which most is allocated; ascending."""
    first, last = timeline.position(marks.begin_ns), timeline.position(marks.end_ns)
    found = {first, *timeline.positions(marks).values()}
    length = max(1, -(-(last + 1 - first) // MAX_STRETCHES))
    for begin in range(first, last + 1, length):
        found.add(max(range(begin, min(begin + length, last + 1)), key=timeline.totals.__getitem__))
    return sorted(found)


def _seconds(timeline: Timeline, marks: StepMarks, position: int) -> float:
    """Returns when a position was reached, since the begin of the step."""
    reached_ns = timeline.change_ns[position - 1] if position else marks.begin_ns
    return max(reached_ns - marks.begin_ns, 0) / 1e9


def _by_category(timeline: Timeline, marks: StepMarks, positions: list[int]) -> dict[Category, list[int]]:
    """Returns the bytes of each category that has any at each position."""
    rows: dict[Category, list[list[int]]] = {}
    for key, row in timeline.held(marks, positions).items():
        rows.setdefault(key.category, []).append(row)
    return {category: [*map(sum, zip(*rows[category], strict=True))] for category in Category if category in rows}

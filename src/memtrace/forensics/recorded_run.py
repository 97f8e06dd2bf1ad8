"""Which steps of a memtrace run a history shows. A snapshot names no process: times and totals tell whose it is.

A step is in a history where that has, when the step ended by the run's clock, as many bytes in use as the run has
counted then, to the byte.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest
from typing import NamedTuple

from memtrace.errors import ConfigError
from memtrace.forensics.history import History
from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import Moment
from memtrace.record.units import format_bytes

_CLOCK_NS = 100_000_000
"""How far the clock of a history, which torch reckons from the processor's counter, may be from the system's."""
_SEARCHED = 5000
"""Changes before and after the end of a step among which the bytes that the run has counted are looked for."""
_FAR_SECONDS = 1e11
"""Beyond every clock: a step log is a file, and may say anything."""
_REASONS = 4
"""Ranks of which a refusal says why."""
_AGREE = 0.5
"""Share of the steps whose totals must agree: more are missed where several threads allocate at the end of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """What one rank of a run has recorded."""

    name: str
    """Of the step log."""
    records: Sequence[StepRecord]


class SeenStep(NamedTuple):
    """A step that a history shows to its end."""

    record: StepRecord
    begin: int
    """Position at which it began; 0 where that was before the history."""
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRun:
    """A run of the process that a history is of."""

    name: str
    steps: Sequence[SeenStep]
    """At least one, in order."""

    def known(self, history: History) -> dict[int, Breakdown]:
        """Returns what the run has traced at positions of the history: at the peak and at the end of each step.

        Only where both have the same bytes in use.
        """
        found = {}
        for step in self.steps:
            for moment, position in (
                (Moment.STEP_END, step.end),
                (Moment.PEAK, history.top(step.begin, step.end)),
            ):
                breakdown = step.record.moments.get(moment)
                if breakdown is None or breakdown.estimated or not step.record.traced:
                    continue
                if breakdown.total_bytes == history.timeline.totals[position]:
                    found[position] = breakdown
        return found


def find_run(history: History, runs: Sequence[RunRecords]) -> SeenRun:
    """Returns the steps of the run of the same process.

    Raises:
        ConfigError: none of the runs is of that process, as far as times and totals tell.
    """
    device = f"cuda:{history.device}"
    reasons = []
    if not history.end or not history.timeline.change_ns[-1]:
        raise ConfigError("a run is matched by times, and the snapshot has no history with times, as torch 2.2 writes")
    for run in runs:
        records = [record for record in run.records if record.device == device]
        if not records:
            known = ", ".join(sorted({repr(record.device) for record in run.records}))
            reasons.append(f"{run.name} is of {known}" if known else f"{run.name} has no steps")
            continue
        ends = [*_ends(history, records)]
        if not ends:
            reasons.append(f"{run.name} has steps {_span(records)}")
            continue
        steps = [*_steps(history, ends)]
        inside = sum(history.timeline.change_ns[0] <= _ns(end.record.unix_seconds) for end in ends)
        if steps and len(steps) >= _AGREE * inside:
            return SeenRun(name=run.name, steps=steps)
        reasons.append(f"{run.name}: {_other_total(history, ends)}")
    if len(reasons) > _REASONS:
        reasons[_REASONS:] = [f"and {len(reasons) - _REASONS} others"]
    raise ConfigError(
        f"the run is of another process than the snapshot, whose history of {device} was recorded {_span_of(history)}: "
        f"{'; '.join(reasons)}"
    )


class _End(NamedTuple):
    record: StepRecord
    nbytes: int
    """In use when the step ended, as the run has counted them."""
    position: int
    """By the time alone."""


def _ends(history: History, records: Sequence[StepRecord]) -> Iterator[_End]:
    """Yields the ends of steps that can be in the history by their times."""
    times = history.timeline.change_ns
    for record in records:
        end = record.moments.get(Moment.STEP_END)
        end_ns = _ns(record.unix_seconds)
        begin_ns = end_ns - _ns(record.step_seconds or 0.0)
        if (
            end is None
            or end.allocated_bytes is None
            or end_ns < times[0] - _CLOCK_NS
            or begin_ns > times[-1] + _CLOCK_NS
        ):
            continue
        yield _End(record, end.allocated_bytes, bisect_right(times, end_ns))


def _steps(history: History, ends: Sequence[_End]) -> Iterator[SeenStep]:
    """Yields the steps at whose end the history has the bytes that the run has counted."""
    times, before = history.timeline.change_ns, -1
    for end in ends:
        position = _nearest(history, end, before + 1)
        if position is None:
            continue
        seconds, end_ns = end.record.step_seconds, _ns(end.record.unix_seconds)
        if position != end.position and position:
            end_ns = times[position - 1]  # by the clock of the history
        begin = 0 if seconds is None else bisect_left(times, end_ns - _ns(seconds))
        yield SeenStep(end.record, max(before, 0, min(begin, position)), position)
        before = position


def _nearest(history: History, end: _End, first: int) -> int | None:
    """Returns the position nearest in the order of changes that has these bytes; the one by time is tried first.

    None before the first one that it may be.
    """
    times, totals, end_ns = history.timeline.change_ns, history.timeline.totals, _ns(end.record.unix_seconds)
    earlier = range(end.position, max(first - 1, end.position - _SEARCHED), -1)
    later = range(max(end.position + 1, first), min(history.end, end.position + _SEARCHED) + 1)
    for position in chain.from_iterable(zip_longest(earlier, later)):
        if position is None or totals[position] != end.nbytes:
            continue
        if position > end.position:
            near = times[position - 1] <= end_ns + _CLOCK_NS
        else:
            near = position == history.end or times[position] >= end_ns - _CLOCK_NS
        if near:
            return int(position)
    return None


def _other_total(history: History, ends: Sequence[_End]) -> str:
    other = next((end for end in ends if _nearest(history, end, 0) is None), None)
    if other is None:
        return "the history has the bytes that were in use at the ends of its steps, but not in their order"
    found = history.timeline.totals[other.position]
    return (
        f"when step {other.record.step} ended, it had {format_bytes(other.nbytes)} in use ({other.nbytes:,} bytes), "
        f"and the history has {format_bytes(found)} ({found:,})"
    )


def _ns(seconds: float) -> int:
    return round(max(-_FAR_SECONDS, min(seconds, _FAR_SECONDS)) * 1e9)


def _span(records: Sequence[StepRecord]) -> str:
    return f"from {_when(records[0].unix_seconds)} to {_when(records[-1].unix_seconds)}"


def _span_of(history: History) -> str:
    times = history.timeline.change_ns
    return f"from {_when(times[0] / 1e9)} to {_when(times[-1] / 1e9)}"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"

"""A run in the trace event format that Perfetto and Chrome read: steps as slices, memory as counters, moments as marks.

Times are microseconds since the base of the file, with three decimals. A counter event (`"ph": "C"`) has one argument a
category, all of them in each event, since a viewer keeps the last value of one that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memtrace.record.breakdown import StepCurve, StepRecord
from memtrace.record.categories import Category, Moment

FIRST_PID = 1_000_000_000
"""Number of rank 0's process in the file. No real process has it, and no device, which torch.profiler's traces number
from 0."""

MEMORY_TRACK = "memory"
"""Bytes by category as they moved within a step that has a timeline; the end of each other step."""
PEAK_TRACK = "memory at the peak of the step"
"""Bytes by category at the peak, from the begin of the step on: when the peak was, only a timeline says."""
TOTAL_TRACK = "memory in all"
"""The sum of the first track, for viewers that do not stack."""
ALLOCATOR_TRACK = "allocator"
"""What the allocator holds of the device at the end of each step, in its three parts."""

_GAP_NS = 10
"""What a slice is shorter than its step, so that it does not run into the next where a viewer rounds."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """One rank's part of a trace."""

    rank: int
    title: str
    """What the viewer writes beside the process."""
    records: Sequence[StepRecord]
    """In order, of one launch."""
    curves: Mapping[int, StepCurve] = field(default_factory=dict)
    """Timelines by step, as far as they are of these records: see `timeline_of`."""
    failures: Sequence[float] = ()
    """When allocations failed, seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """One step on the clock of the file, nanoseconds since 1970. Slices of one track do not overlap."""

    record: StepRecord
    begin_ns: int
    end_ns: int


def timeline_of(record: StepRecord, curve: StepCurve) -> bool:
    """Returns whether a timeline is of a step: both say the same of the peak, to the byte.

    A timeline names its step and not its launch, and an earlier launch may have left it.
    """
    peak, at = record.moments.get(Moment.PEAK), curve.moments.get(Moment.PEAK)
    if peak is None or at is None or not record.traced or curve.seconds[-1] > (record.step_seconds or 0.0) + 1e-6:
        return False
    sizes = peak.by_category()
    return any(
        second == at and {category: row[place] for category, row in curve.by_category.items() if row[place]} == sizes
        for place, second in enumerate(curve.seconds)
    )


def begin_ns(record: StepRecord) -> int:
    """Returns when a step began, nanoseconds since 1970; when it ended where it is not known how long it took."""
    return _ns(record.unix_seconds - (record.step_seconds or 0.0))


def trace_events(rank: RankTrace, base_ns: int) -> Iterator[Event]:
    """Yields the events of one rank, each track in the order of time.

    Args:
        rank: what is to be shown.
        base_ns: begin of the file's clock, nanoseconds since 1970.
    """
    pid = FIRST_PID + rank.rank
    spans = list(_spans(rank.records))
    yield from process_events(pid, rank.title, rank.rank, "steps")
    for span in spans:
        yield _slice(pid, span, base_ns)
    for span in spans:
        yield from _marks(pid, span, rank.curves.get(span.record.step), base_ns)
    for seconds in rank.failures:
        yield mark_event(pid, "out of memory", _ns(seconds), base_ns, scope="p")
    yield from _memory(pid, spans, rank.curves, base_ns)
    yield from _peaks(pid, spans, base_ns)
    yield from _allocator(pid, spans, base_ns)


def memory_events(pid: int, points: Sequence[tuple[int, Mapping[Category, int]]], base_ns: int) -> Iterator[Event]:
    """Yields the counters of what is allocated, by category and in all, at points in order; nanoseconds."""
    for at_ns, arguments in _counters(points):
        yield _event(pid, "C", MEMORY_TRACK, at_ns, base_ns, args=arguments)
        yield _event(pid, "C", TOTAL_TRACK, at_ns, base_ns, args={"bytes": sum(arguments.values())})


def process_events(pid: int, title: str, place: int, thread: str) -> Iterator[Event]:
    """Yields what a viewer writes beside a process and its thread, and its place among the others."""
    named = {
        "process_name": {"name": title},
        "process_sort_index": {"sort_index": place},
        "thread_name": {"name": thread},
    }
    for name, arguments in named.items():
        yield {"ph": "M", "name": name, "pid": pid, "tid": pid, "args": arguments}


def mark_event(pid: int, name: str, at_ns: int, base_ns: int, *, scope: str) -> Event:
    """Returns a mark on a thread (scope `t`) or a whole process (`p`)."""
    return _event(pid, "i", name, at_ns, base_ns, s=scope, cat="memtrace")


def render_trace(events: Iterable[Event], head: Mapping[str, Any]) -> Iterator[str]:
    """Yields the parts of the JSON file: the events, one a line, and the fields of `head` behind them.

    Perfetto wants the unit before the events, and its older versions read nothing behind a field that they do not know.
    """
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    yield '{"displayTimeUnit":"ms","traceEvents":['
    for number, event in enumerate(events):
        yield f"{',' if number else ''}\n{encode(event)}"
    yield "\n]"
    for name, value in head.items():
        if name not in ("displayTimeUnit", "traceEvents"):
            yield f",{encode(name)}:{encode(value)}"
    yield "}\n"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _spans(records: Iterable[StepRecord]) -> Iterator[_Span]:
    """Yields when each step was. One that begins before the last one's end, after a change of the clock, is cut."""
    last = 0
    for record in records:
        begin, end = begin_ns(record), _ns(record.unix_seconds)
        begin = max(begin, last)
        last = max(end, begin)
        yield _Span(record=record, begin_ns=begin, end_ns=last)


def _event(pid: int, phase: str, name: str, at_ns: int, base_ns: int, **fields: Any) -> Event:
    # The thread has the number of its process: then viewers take it for the main one, and no two ranks share it.
    return {"ph": phase, "name": name, "pid": pid, "tid": pid, "ts": (at_ns - base_ns) / 1000, **fields}


def _slice(pid: int, span: _Span, base_ns: int) -> Event:
    record = span.record
    told: dict[str, Any] = {"step": record.step, "traced": record.traced}
    if record.batch is not None:
        told |= {"batch": "x".join(map(str, record.batch.shape)), "tokens": record.batch.tokens}
    for moment, breakdown in record.moments.items():
        told[f"{moment}_bytes"] = breakdown.held_bytes
        if breakdown.estimated:
            told[f"{moment}_estimated"] = True
    length = max(0, span.end_ns - span.begin_ns - _GAP_NS) / 1000
    name = f"step {record.step}"
    return _event(pid, "X", name, span.begin_ns, base_ns, dur=length, cat="memtrace", args=told)


def _marks(pid: int, span: _Span, curve: StepCurve | None, base_ns: int) -> Iterator[Event]:
    """Yields the moments of a step whose time is known: all of one with a timeline."""
    moments = {} if curve is None else curve.moments
    for moment, seconds in sorted(moments.items(), key=lambda item: item[1]):
        yield mark_event(pid, moment.value, _within(span, seconds), base_ns, scope="t")


def _within(span: _Span, seconds: float) -> int:
    """Returns when a point of a timeline was."""
    return min(max(begin_ns(span.record) + _ns(seconds), span.begin_ns), span.end_ns)


def _memory(pid: int, spans: Sequence[_Span], curves: Mapping[int, StepCurve], base_ns: int) -> Iterator[Event]:
    points: list[tuple[int, Mapping[Category, int]]] = []
    for span in spans:
        curve, end = curves.get(span.record.step), span.record.moments.get(Moment.STEP_END)
        if curve is not None:
            for place, seconds in enumerate(curve.seconds):
                points.append((_within(span, seconds), {name: row[place] for name, row in curve.by_category.items()}))
        elif end is not None:
            points.append((span.end_ns, end.by_category()))
    yield from memory_events(pid, points, base_ns)


def _peaks(pid: int, spans: Sequence[_Span], base_ns: int) -> Iterator[Event]:
    known = ((span.begin_ns, span.record.moments.get(Moment.PEAK)) for span in spans)
    points = [(at_ns, peak.by_category()) for at_ns, peak in known if peak is not None]
    for at_ns, arguments in _counters(points):
        yield _event(pid, "C", PEAK_TRACK, at_ns, base_ns, args=arguments)


def _counters(points: Sequence[tuple[int, Mapping[Category, int]]]) -> Iterator[tuple[int, dict[str, int]]]:
    """Yields the arguments of each point: every category that any of them has, in the stacking order."""
    seen = {category for _, sizes in points for category in sizes}
    shown = [category for category in Category if category in seen]
    for at_ns, sizes in points:
        yield at_ns, {category.value: sizes.get(category, 0) for category in shown}


def _allocator(pid: int, spans: Sequence[_Span], base_ns: int) -> Iterator[Event]:
    for span in spans:
        reading = span.record.allocator
        if reading is not None:
            parts = {
                "allocated": reading.allocated_bytes,
                "slack": reading.slack_bytes,
                "private_pools": reading.private_pool_bytes or 0,
            }
            yield _event(pid, "C", ALLOCATOR_TRACK, span.end_ns, base_ns, args=parts)

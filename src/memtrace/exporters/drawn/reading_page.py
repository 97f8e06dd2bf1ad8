"""What allocator snapshots say, as one HTML file without a script: the timeline and the table of each device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from memtrace.exporters.drawn.areas import Areas, svg
from memtrace.exporters.drawn.page import page_head
from memtrace.exporters.reading_table import ranks_of_readings, reading_table
from memtrace.exporters.table import plain_text
from memtrace.record.breakdown import StepCurve
from memtrace.record.readings.snapshot_reading import SnapshotMoment, SnapshotReading


def render_readings(readings: Sequence[SnapshotReading]) -> str:
    """Returns the page. All text that a snapshot or a file name brings along is escaped."""
    names = ", ".join(reading.name for reading in readings)
    parts = [page_head(names), f"<h1>{escape(names)}</h1>"]
    if len(readings) > 1:
        parts.append(f"<pre>{escape(plain_text(ranks_of_readings(readings)))}</pre>")
    for reading in readings:
        parts += _devices(reading)
    return "\n".join([*parts, "</body></html>", ""])


def _devices(reading: SnapshotReading) -> Iterator[str]:
    for device in reading.devices:
        yield f"<h2>{escape(reading.name)}, device {device.device}</h2>"
        if device.curve is not None:
            yield _drawn(device.curve, timed=device.moments[SnapshotMoment.END].seconds is not None)
        yield f"<pre>{escape(plain_text(reading_table(replace(reading, devices=[device]))))}</pre>"
    if not reading.devices:
        yield f"<pre>{escape(plain_text(reading_table(reading)))}</pre>"


def _drawn(curve: StepCurve, *, timed: bool) -> str:
    """Returns the timeline; over its points where the history has no times."""
    x = curve.seconds if timed else [*range(len(curve.seconds))]
    marks = {moment.value: seconds for moment, seconds in curve.moments.items()} if timed else {}
    title = "seconds since the begin of the history" if timed else "points of the history"
    return svg(Areas(x=x, by_category=curve.by_category, x_title=title, holds=True, marks=marks))

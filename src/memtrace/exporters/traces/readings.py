"""Histories of allocator snapshots in the trace event format: memory by category, marks at peak and failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memtrace.exporters.table import printable
from memtrace.exporters.traces.events import FIRST_PID, Event, mark_event, memory_events, process_events
from memtrace.record.readings.snapshot_reading import DeviceReading, SnapshotMoment, SnapshotReading


def reading_events(readings: Sequence[SnapshotReading]) -> Iterator[Event]:
    """Yields the events of each device that has a history, a process each.

    A clock begins with each history, or counts its points where it has no times (torch 2.1).
    """
    devices = [(reading.name, device) for reading in readings for device in reading.devices]
    for place, (name, device) in enumerate(devices):
        if device.curve is not None:
            yield from process_events(FIRST_PID + place, f"{printable(name)}, device {device.device}", place, "history")
            yield from _device(FIRST_PID + place, device)


def _device(pid: int, device: DeviceReading) -> Iterator[Event]:
    curve = device.curve
    assert curve is not None
    timed = device.moments[SnapshotMoment.END].seconds is not None
    times = [round(at * 1e9) for at in curve.seconds] if timed else [1000 * at for at in range(len(curve.seconds))]
    if timed:
        names = {SnapshotMoment.PEAK: "peak", SnapshotMoment.FAILURE: "out of memory"}
        for moment, name in names.items():
            seconds = device.moments[moment].seconds if moment in device.moments else None
            if seconds is not None:
                yield mark_event(pid, name, round(seconds * 1e9), 0, scope="t")
    rows = [{name: row[at] for name, row in curve.by_category.items()} for at in range(len(times))]
    yield from memory_events(pid, [*zip(times, rows, strict=True)], 0)

"""The JSON form of what an allocator's snapshot says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from memtrace.record.breakdown import StepCurve
from memtrace.record.readings.snapshot_reading import DeviceReading, ReadBreakdown, SnapshotReading

READING_SCHEMA = "memtrace.read/1"


def document_of(readings: Sequence[SnapshotReading]) -> dict[str, Any]:
    """Returns the document of one or several snapshots."""
    return {
        "schema": READING_SCHEMA,
        "snapshots": [
            {"name": reading.name, "devices": [_device(device) for device in reading.devices]} for reading in readings
        ],
    }


def _device(device: DeviceReading) -> dict[str, Any]:
    failure = device.failure
    return {
        "device": device.device,
        "events": device.events,
        "steps": device.steps,
        "moments": {moment.value: _breakdown(breakdown) for moment, breakdown in device.moments.items()},
        "holders": [
            {"category": holder.category.value, "place": holder.place, "blocks": holder.blocks, "bytes": holder.nbytes}
            for holder in device.holders
        ],
        "fragmentation": asdict(device.fragmentation),
        "failure": None if failure is None else asdict(failure),
        "remedies": [asdict(remedy) for remedy in device.remedies],
        "timeline": None if device.curve is None else _curve(device.curve),
        "notes": list(device.notes),
    }


def _breakdown(breakdown: ReadBreakdown) -> dict[str, Any]:
    return {
        "allocated_bytes": breakdown.total_bytes,
        "reserved_bytes": breakdown.reserved_bytes,
        "seconds": breakdown.seconds,
        "entries": [
            {
                "category": key.category.value,
                "component": key.component,
                "dtype": key.dtype,
                "source": key.source.value,
                "bytes": nbytes,
            }
            for key, nbytes in breakdown.entries.items()
        ],
    }


def _curve(curve: StepCurve) -> dict[str, Any]:
    return {
        "seconds": [round(second, 7) for second in curve.seconds],
        "categories": {category.value: [*sizes] for category, sizes in curve.by_category.items()},
    }

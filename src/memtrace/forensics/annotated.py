"""A snapshot with the category of each block, as memory_viz colours them: a pickle of protocol 4.

memory_viz reads `category` from allocations in the history, and from nothing else: blocks from before it get an entry
of their own at its beginning. It needs a category `unknown` among the others, and shows `user_metadata` as text.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memtrace.errors import ConfigError, OutputError
from memtrace.forensics.attribution.by_note import note_of
from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.joined import Attributed, attribute_devices
from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.recorded_run import RunRecords
from memtrace.forensics.snapshot import AllocatorSnapshot, Segment
from memtrace.forensics.trace import UNKNOWN, Trace
from memtrace.record.categories import Category

MAX_ENTRIES = 1_000_000
"""Entries that are annotated at most: each is a dictionary while it is written, and a browser shows no more."""

_UNKNOWN = "unknown"


def write_annotated(
    snapshot: AllocatorSnapshot, model: ExpectedModel | None, path: Path, runs: Sequence[RunRecords] = ()
) -> None:
    """Writes the snapshot with categories.

    Args:
        snapshot: as it was loaded.
        model: whose sizes blocks are matched with, where one was given.
        path: of the file to write.
        runs: what the ranks of a memtrace run of the same process have recorded.

    Raises:
        ConfigError: the history is too long, or no run is of that process.
        OutputError: the file cannot be written.
    """
    entries = sum(len(trace) for trace in snapshot.traces)
    if entries > MAX_ENTRIES:
        raise ConfigError(f"a history of {entries:,} entries is not annotated: {MAX_ENTRIES:,} are the most")
    frames = [[frame._asdict() for frame in stack] for stack in snapshot.stacks]
    count = max([len(snapshot.traces), *(device + 1 for device in snapshot.devices)])
    traces: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for found in attribute_devices(snapshot, model, runs):
        device = found.history.device
        traces[device] = [*_before(found, frames), *_entries(snapshot.trace(device), found, frames)]
    content = {
        "segments": [_segment(segment, frames) for segment in snapshot.segments],
        "device_traces": traces,
        "allocator_settings": dict(snapshot.settings),
    }
    try:
        path.write_bytes(pickle.dumps(content, protocol=4))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _before(found: Attributed, frames: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields an allocation for each block that was there before the history; and the category that must be there."""
    yield {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 0, "frames": [], "category": _UNKNOWN}
    first = found.history.timeline.change_ns
    time_us = first[0] // 1000 if first else 0
    for index, life in enumerate(found.history.timeline.lifetimes):
        if life.begin >= 0:
            return
        yield {
            "action": "alloc",
            "addr": life.address,
            "size": life.nbytes,
            "stream": 0,
            "time_us": time_us,
            "frames": _stack(found.history.stacks[index], frames),
            **_marks(found.label(index)),
        }


def _entries(trace: Trace, found: Attributed, frames: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    of_row = dict(zip(found.history.rows, range(len(found.history.rows)), strict=True))
    for row, entry in enumerate(trace):
        written = {
            "action": entry.action,
            "addr": max(entry.address, 0),
            "size": max(entry.size, 0),
            "stream": max(entry.stream, 0),
            "frames": _stack(entry.stack, frames),
        }
        if entry.time_us != UNKNOWN:
            written["time_us"] = entry.time_us
        if entry.device_free != UNKNOWN:
            written["device_free"] = entry.device_free
        index = of_row.get(row)
        if entry.action == "alloc" and index is not None:
            written |= _marks(found.label(index))
        elif entry.note:
            written["user_metadata"] = entry.note
        yield written


def _marks(label: Label) -> dict[str, str]:
    if label.category is Category.UNATTRIBUTED:
        return {"category": _UNKNOWN}
    return {"category": label.category.value, "user_metadata": note_of(label)}


def _stack(stack: int, frames: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return frames[stack] if stack >= 0 else []


def _segment(segment: Segment, frames: list[list[dict[str, Any]]]) -> dict[str, Any]:
    live = [block for block in segment.blocks if block.live]
    return {
        "device": segment.device,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": sum(block.size for block in live),
        "active_size": sum(block.size for block in live),
        "stream": segment.stream,
        "segment_type": "small" if segment.size <= 2 << 20 else "large",
        "is_expandable": segment.expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": "active_allocated" if block.live else "inactive",
                "frames": _stack(block.stack, frames),
            }
            for block in segment.blocks
        ],
    }

"""Snapshots of CUDA's allocator that are cut off, spoilt or no snapshots at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spoiling import json_values, spoilt
from test_cuda import BEGIN, END, block, entry, segment, snapshot

from memtrace.errors import LogFormatError
from memtrace.record.breakdown import AllocatorReading
from memtrace.sources.cuda.allocator import live_blocks, parse_counters
from memtrace.sources.cuda.history import parse_window
from memtrace.sources.events import Block, Window

STATS = {
    "allocated_bytes": {"all": {"current": 300, "peak": 900}},
    "reserved_bytes": {"all": {"current": 1 << 21, "peak": 1 << 21}},
    "requested_bytes": {"all": {"current": 290}},
    "inactive_split_bytes": {"all": {"current": 7}},
    "num_alloc_retries": 1,
    "num_ooms": 2,
}
numbers = st.integers(0, 2**64) | st.integers(1, 64)
actions = st.sampled_from(["alloc", "free_requested", "free_completed", "segment_alloc", "oom", "snapshot"])
entries = st.builds(entry, actions, st.integers(0, 12_000), numbers, numbers)
states = st.sampled_from(["active_allocated", "active_awaiting_free", "active_pending_free", "inactive"])
blocks = st.lists(st.builds(block, numbers, numbers, numbers, states), max_size=3)
segments = st.builds(lambda found, address: segment(*found, address=address), blocks, numbers)
whole = st.builds(
    lambda history, found: snapshot(*history, segments=found),
    st.lists(entries, max_size=5),
    st.lists(segments, max_size=3),
)
anything = whole | spoilt(whole) | json_values
live = st.lists(st.builds(Block, numbers, numbers), max_size=2).map(tuple)


@given(anything, st.integers(0, 3), live)
def test_any_snapshot_is_read_or_refused(found: Any, device: int, at_begin: tuple[Block, ...]) -> None:
    """A window of what the snapshot truly holds, or a LogFormatError that says what is missing."""
    try:
        window = parse_window(found, device, BEGIN, END, at_begin)
    except LogFormatError as error:
        assert "'device_traces'" in str(error)
        return
    assert isinstance(window, Window)
    traces = found["device_traces"]
    history = [one for one in traces[device] if isinstance(one, dict)] if window.events else []
    told = [(one.get("action"), one.get("addr"), one.get("size")) for one in history]
    for event in window.events:
        assert ("alloc" if event.delta > 0 else "free_completed", event.address, abs(event.delta)) in told


@given(st.lists(segments) | spoilt(st.lists(segments, min_size=1)) | json_values)
def test_any_segments_are_read(found: Any) -> None:
    """Blocks whose place and size are numbers, whatever the rest is."""
    for one in live_blocks(found, 0):
        assert isinstance(one.address, int)
        assert isinstance(one.nbytes, int)


@given(spoilt(st.just(STATS)) | st.dictionaries(st.sampled_from(sorted(STATS)), json_values))
def test_any_counters_are_read(stats: Any) -> None:
    """Numbers, or nothing."""
    reading = parse_counters(stats)
    if reading is not None:
        assert isinstance(reading, AllocatorReading)
        assert isinstance(reading.allocated_bytes, int)
        assert isinstance(reading.reserved_bytes, int)


@pytest.mark.parametrize("kept", range(5))
def test_history_that_was_cut_off_is_not_complete(kept: int) -> None:
    """Without its last allocations, a history does not lead to the blocks that are live."""
    allocations = [entry("alloc", 2000 + number, 0x1000 * number, 64) for number in range(1, 6)]
    held = segment(*(block(one["addr"], 512, 64) for one in allocations))
    assert parse_window(snapshot(*allocations, segments=[held]), 0, BEGIN, END, ()).complete
    assert not parse_window(snapshot(*allocations[:kept], segments=[held]), 0, BEGIN, END, ()).complete

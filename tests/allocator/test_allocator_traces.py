"""Traces of CUDA's caching allocator, through the parser of snapshots and the model of the allocator.

`make record-gpu-traces` adds traces of a real device beside the one that is made by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record_gpu_traces import SCHEMA, document
from memtrace.allocator.caching_allocator import CachingAllocator, replay
from memtrace.sources.cuda.history import parse_window

FIXTURES = Path(__file__).parents[1] / "fixtures"
TRACES = sorted([*(FIXTURES / "allocator_traces").glob("*.json"), *(FIXTURES / "gpu" / "traces").glob("*.json")])
FOREVER_NS = 2**62
RESERVED_SHARE = 0.03
"""What the model may miss of the reserved peak of a device: it does not know where new segments are put."""


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_model_counts_what_the_allocator_counted(path: Path) -> None:
    """Bytes as requested and as rounded to the byte, and the peak of what was reserved."""
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert trace["schema"] == SCHEMA
    window = parse_window(trace["snapshot"], 0, 0, FOREVER_NS, ())
    assert window.complete
    assert len(window.events) > 5
    modelled, counted = replay(window.events, CachingAllocator()), trace["counters"]
    assert modelled.requested_bytes[-1] == counted["requested_bytes"]
    assert modelled.allocated_bytes[-1] == counted["allocated_bytes"]
    by_hand = path.stem == "by_hand"
    missed = abs(modelled.peak_reserved_bytes - counted["peak_reserved_bytes"])
    assert missed <= (0 if by_hand else RESERVED_SHARE * counted["peak_reserved_bytes"])


def test_a_trace_that_was_lost_in_part_is_noticed() -> None:
    """Without its first event a trace no longer leads to the blocks that are live at its end."""
    trace = json.loads(next(path for path in TRACES if path.stem == "by_hand").read_text(encoding="utf-8"))
    history = trace["snapshot"]["device_traces"][0]
    del history[next(number for number, entry in enumerate(history) if entry["size"] == 1000)]
    assert not parse_window(trace["snapshot"], 0, 0, FOREVER_NS, ()).complete


def test_a_fixture_keeps_what_is_read_and_nothing_else() -> None:
    """No stacks, no other device, none of the fields that torch adds."""
    block = {"address": 1, "size": 512, "requested_size": 9, "state": "active_allocated"}
    segment = {"device": 0, "address": 1, "total_size": 1 << 21, "segment_type": "small"}
    entry = {"action": "alloc", "addr": 1, "size": 9, "time_us": 5}
    stats = {"requested_bytes.all.current": 9, "allocated_bytes.all.current": 512, "reserved_bytes.all.peak": 1 << 21}
    snapshot = {
        "device_traces": [[{**entry, "frames": ["secret"], "stream": 0}], [entry]],
        "segments": [
            {**segment, "blocks": [{**block, "frames": ["secret"]}], "frames": []},
            {**segment, "device": 1, "blocks": []},
        ],
    }
    found = document(snapshot, stats, "a test")
    assert found["snapshot"] == {"device_traces": [[entry]], "segments": [{**segment, "blocks": [block]}]}
    assert found["counters"] == {"requested_bytes": 9, "allocated_bytes": 512, "peak_reserved_bytes": 1 << 21}
    assert parse_window(found["snapshot"], 0, 0, FOREVER_NS, ()).complete

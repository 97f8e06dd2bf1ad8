"""Which blocks pin free memory at the moment of a failure: segment by segment, with their categories."""

from __future__ import annotations

from cuda_scenes import CASES, report_of

from memtrace.oom.fragmentation import MAX_PINNED, MAX_PINS, parse_fragmentation
from memtrace.oom.markdown import render_markdown
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category
from memtrace.record.oom.report import PinnedSegment
from memtrace.record.units import GIB, MIB

STATE = EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32")


def segment(number: int, used: int, free: int, **more: object) -> dict[str, object]:
    """A segment of one block in use and one free piece, in MiB."""
    address = number << 40
    blocks = [
        {"address": address, "size": used * MIB, "state": "active_allocated"},
        {"address": address + used * MIB, "size": free * MIB, "state": "inactive"},
    ]
    return {"device": 0, "address": address, "blocks": [block for block in blocks if block["size"]]} | more


def test_segments_with_most_free_memory_come_first() -> None:
    """With what their blocks are for; segments that are wholly free, whole, private or growing are none."""
    listed = [
        *(segment(number, 60, 40 + number) for number in range(1, 9)),
        segment(20, 0, 300),
        segment(21, 300, 0),
        segment(22, 2, 300, is_expandable=True),
        segment(23, 2, 300, segment_pool_id=(0, 1)),
        {"device": 0, "blocks": [{"size": "large", "state": "inactive"}, {"size": MIB}, 7]},
    ]
    found = parse_fragmentation(listed, 0, {8 << 40: STATE})
    assert len(found.pinned) == MAX_PINNED
    assert found.pinned[0] == PinnedSegment(size=108 * MIB, free_bytes=48 * MIB, pinned_by=1, pins=((60 * MIB, STATE),))
    assert found.pinned[1].pins == ()
    assert [pinned.free_bytes for pinned in found.pinned] == [size * MIB for size in (48, 47, 46, 45, 44)]


def test_the_report_names_them() -> None:
    """40 free pieces between 40 frozen weights of one segment: the page shows the smallest weights."""
    report = report_of(next(case for case in CASES if case.free_pieces))
    assert report.fragmentation is not None
    (pinned,) = report.fragmentation.pinned
    assert (pinned.free_bytes, pinned.pinned_by, len(pinned.pins)) == (4000 * MIB, 40, MAX_PINS)
    text = render_markdown(report)
    assert "## Fragments" in text
    assert "| 3.91 GiB | 7.81 GiB | 40 | weights frozen bfloat16 100.00 MiB, " in text
    assert pinned.size < 8 * GIB

"""A plan held against a measured step."""

from __future__ import annotations

import pytest
from records import PEAK_ENTRIES, breakdown, traced_step

from memtrace.errors import PlanError
from memtrace.planning.comparison import compare
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import ByteRange, Plan

WEIGHTS = EntryKey(Category.WEIGHTS, "trainable", "bfloat16")


def planned(entries: dict[EntryKey, int], moment: Moment = Moment.PEAK) -> Plan:
    return Plan(
        recipe="bf16-master",
        optimizer="adamw",
        setup={},
        moments={moment: breakdown(moment, entries)},
        assumptions=(),
        allocated=ByteRange(low=0, high=0),
    )


def test_categories_are_in_their_order_and_the_total_is_last() -> None:
    """Every category that either of them has, with the signed difference."""
    rows = compare(planned({WEIGHTS: 10, EntryKey(Category.COMM_BUFFERS, "", ""): 7}), traced_step())[Moment.PEAK]
    measured = {row.category: (row.planned, row.measured) for row in rows}
    assert [row.category for row in rows][:2] == [Category.WEIGHTS, Category.MASTER_WEIGHTS]
    assert measured[Category.WEIGHTS] == (10, PEAK_ENTRIES[WEIGHTS])
    assert measured[Category.COMM_BUFFERS] == (7, 0)
    assert rows[-1].category is None
    assert rows[-1].nbytes == sum(PEAK_ENTRIES.values()) - 17
    assert {row.category: row.ratio for row in rows}[Category.COMM_BUFFERS] is None


def test_only_moments_that_both_know_are_compared() -> None:
    """A plan by formula may know the peak alone, a counted step may not."""
    assert list(compare(planned({WEIGHTS: 1}), traced_step())) == [Moment.PEAK]
    with pytest.raises(PlanError, match="compare with a traced step, got one that knows none"):
        compare(planned({WEIGHTS: 1}), traced_step(moments={}))

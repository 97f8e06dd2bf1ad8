"""The rows of a plan that the table and the markdown share."""

from __future__ import annotations

from memtrace.cli.plan.rows import peak_rows
from memtrace.record.breakdown import Breakdown, EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import ByteRange, Plan


def test_entries_that_hardly_show_share_a_row_of_their_category() -> None:
    """What is less than a thousandth of the peak is joined by category; nothing gets lost."""
    sizes = {
        EntryKey(Category.WEIGHTS, "trainable", "float32"): 50_000,
        EntryKey(Category.ACTIVATIONS, "", "bfloat16"): 49_000,
        EntryKey(Category.ACTIVATIONS, "", "int64"): 20,
        EntryKey(Category.ACTIVATIONS, "", "uint64"): 10,
        EntryKey(Category.UNATTRIBUTED, "outside", ""): 970,
    }
    plan = Plan(
        recipe="fp32",
        optimizer="adamw",
        setup={},
        moments={Moment.PEAK: Breakdown(moment=Moment.PEAK, entries=sizes, allocated_bytes=100_000)},
        assumptions=(),
        allocated=ByteRange(low=100_000, high=100_000),
    )
    rows = list(peak_rows(plan))
    assert [(row.part, row.size) for row in rows if row.category is Category.ACTIVATIONS] == [
        ("bfloat16", 49_000),
        ("int64, uint64", 30),
    ]
    assert sum(row.size for row in rows[:-1]) == rows[-1].size == 100_000

"""Ranks side by side: who holds more than the others."""

from __future__ import annotations

from dataclasses import replace

from records import GIB, PEAK_ENTRIES, breakdown, counted_step, traced_step

from memtrace.exporters.ranks import MAX_RANK_COLUMNS, ranks_table
from memtrace.exporters.table import plain_text
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment

ACTIVATIONS = EntryKey(Category.ACTIVATIONS, "", "bfloat16")

TWO = """\
2 ranks · step 12

peak, in GiB                        rank 0    rank 1    spread
────────────────────────────────────────────────────────────────────
■ weights                             2.00      2.00         -
■ master_weights                      4.00      4.00         -
■ gradients                           1.00      1.00         -
■ optimizer_state                     8.00      8.00         -
■ activations                         3.00      6.00      3.00   50%
■ inputs                             <0.01     <0.01         -
■ temporaries                         0.50      0.50         -
■ unattributed                           -         -         -

total                                18.50     21.50      3.00   14%
reserved, at the end of the step     20.00     20.00         -
free on the device                   56.00     56.00         -"""


def rank(number: int, activations: int = 3 * GIB, step: int = 12) -> StepRecord:
    peak = breakdown(Moment.PEAK, PEAK_ENTRIES | {ACTIVATIONS: activations})
    return traced_step(rank=number, step=step, moments={Moment.PEAK: peak})


def text(*records: StepRecord) -> str:
    shown = plain_text(ranks_table({record.rank: record for record in records}))
    return "\n".join(line.rstrip() for line in shown.splitlines())


def test_two_ranks() -> None:
    """A column for each rank, and how far apart they are: in bytes, and as a share of the highest."""
    assert text(rank(0), rank(1, 6 * GIB)) == TWO


def test_many_ranks_are_summed_up() -> None:
    """More ranks than columns are shown by the lowest, the median and the highest, and who that is."""
    records = [rank(number, (number + 1) * GIB) for number in range(2 * MAX_RANK_COLUMNS)]
    shown = text(*records)
    assert f"{len(records)} ranks · step 12" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("■ activations"))
    assert line.split()[2:] == ["rank", "0", "1.00", "6.50", "rank", "11", "12.00", "11.00", "92%"]


def test_a_rank_without_a_peak_leaves_its_cells_empty() -> None:
    """What one rank does not know is blank and spreads nothing; the steps are told where they differ."""
    shown = text(rank(0), counted_step(rank=1))
    assert "2 ranks · steps 12 to 13: the ranks share none whose peak is known" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("■ weights"))
    assert line.split() == ["■", "weights", "2.00"]


def test_offloaded_bytes_have_a_row() -> None:
    """Where a rank keeps anything on the host."""
    key = EntryKey(Category.MASTER_WEIGHTS, "", "float32")
    shown = text(replace(rank(0), host={key: 4 * GIB}), replace(rank(1), host={key: 6 * GIB}))
    (line,) = (line for line in shown.splitlines() if line.startswith("offloaded to the host"))
    assert line.split()[4:] == ["4.00", "6.00", "2.00", "33%"]


def test_a_large_device_does_not_hide_a_small_run() -> None:
    """The unit is that of the peak: MiB here, beside 56 GiB that are free."""
    moments = {Moment.PEAK: breakdown(Moment.PEAK, {ACTIVATIONS: 3 * 2**20})}
    shown = text(*(replace(rank(number), moments=moments) for number in range(2)))
    assert "peak, in MiB" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("total"))
    assert line.split() == ["total", "3.00", "3.00", "-"]


def test_ranks_on_a_cpu() -> None:
    """Without an allocator there is no reserve to compare."""
    records = [replace(rank(number), allocator=None) for number in range(2)]
    assert "reserved" in text(rank(0), rank(1))
    (line,) = (line for line in text(*records).splitlines() if line.startswith("reserved"))
    assert line.split() == ["reserved,", "at", "the", "end", "of", "the", "step"]

"""The peaks of all ranks of a run side by side, so that imbalance is seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memtrace.exporters.table import Scale, category_name
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment

MAX_RANK_COLUMNS = 6
"""Ranks that have a column each; more are summed up as lowest, median and highest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    title: Text
    sizes: Mapping[int, int]
    """Bytes of each rank that knows them."""
    totals: bool = False
    """Whether it is set apart from the categories."""
    of_peak: bool = True
    """Whether it is a part of the peak: these set the unit, so that a large device does not make them all 0."""


def ranks_table(records: Mapping[int, StepRecord]) -> RenderableType:
    """Returns the peaks of several ranks as a rich renderable, with the spread between them.

    The spread is the highest minus the lowest, also as a share of the highest.

    Args:
        records: one record of each rank, in the order of the ranks. One without a peak leaves its cells empty.
    """
    rows = list(_rows(records))
    known = [row for row in rows if row.of_peak and row.sizes] or rows
    scale = Scale(max((size for row in known for size in row.sizes.values()), default=0))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(f"peak, in {scale.unit}", min_width=14, no_wrap=True)
    ranks = list(records)
    for head in (
        [f"rank {rank}" for rank in ranks] if len(ranks) <= MAX_RANK_COLUMNS else ["lowest", "median", "highest"]
    ):
        table.add_column(head, justify="right", min_width=8, no_wrap=True)
    table.add_column("spread", justify="right", min_width=8, no_wrap=True)
    table.add_column("", justify="right", min_width=4, no_wrap=True)
    for row in rows:
        cells = _each(row, ranks, scale) if len(ranks) <= MAX_RANK_COLUMNS else _summary(row, scale)
        if row.totals:
            table.add_section()
        table.add_row(row.title, *cells, *_spread(row, scale), style="bold" if row.totals else None)
    return Group(Text(_headline(records), "bold"), "", table)


def _headline(records: Mapping[int, StepRecord]) -> str:
    steps = {record.step for record in records.values()}
    if len(steps) == 1:
        return f"{len(records)} ranks · step {steps.pop()}"
    return f"{len(records)} ranks · steps {min(steps)} to {max(steps)}: the ranks share none whose peak is known"


def _rows(records: Mapping[int, StepRecord]) -> Iterator[_Row]:
    peaks = {rank: record.moments[Moment.PEAK] for rank, record in records.items() if Moment.PEAK in record.moments}
    for category in Category:
        sizes = {rank: peak[category] for rank, peak in peaks.items()}
        if any(sizes.values()) or category is Category.UNATTRIBUTED:
            yield _Row(title=category_name(category), sizes=sizes)
    yield _Row(title=Text("total"), sizes={rank: peak.total_bytes for rank, peak in peaks.items()}, totals=True)
    yield _Row(title=Text("reserved, at the end of the step"), sizes=_known(records, _reserved), of_peak=False)
    if host := _known(records, lambda record: sum(record.host.values()) or None):
        yield _Row(title=Text("offloaded to the host"), sizes=host, of_peak=False)
    yield _Row(title=Text("free on the device"), sizes=_known(records, _free), of_peak=False)


def _known(records: Mapping[int, StepRecord], read: Callable[[StepRecord], int | None]) -> dict[int, int]:
    sizes = {rank: read(record) for rank, record in records.items()}
    return {rank: size for rank, size in sizes.items() if size is not None}


def _reserved(record: StepRecord) -> int | None:
    return None if record.allocator is None else record.allocator.reserved_bytes


def _free(record: StepRecord) -> int | None:
    return None if record.device_memory is None else record.device_memory.free_bytes


def _each(row: _Row, ranks: Sequence[int], scale: Scale) -> list[Text]:
    return [scale.cell(row.sizes.get(rank)) for rank in ranks]


def _summary(row: _Row, scale: Scale) -> list[Text]:
    """Returns the lowest and the highest size, with the rank that has it, around the median."""
    if not row.sizes:
        return [Text("")] * 3
    lowest, highest = min(row.sizes, key=row.sizes.__getitem__), max(row.sizes, key=row.sizes.__getitem__)
    median = scale.cell(int(statistics.median(row.sizes.values())))
    return [_of_rank(lowest, row, scale), median, _of_rank(highest, row, scale)]


def _of_rank(rank: int, row: _Row, scale: Scale) -> Text:
    return Text.assemble((f"rank {rank} ", "dim"), scale.cell(row.sizes[rank]))


def _spread(row: _Row, scale: Scale) -> list[Text]:
    if len(row.sizes) < 2:
        return [Text(""), Text("")]
    spread, highest = max(row.sizes.values()) - min(row.sizes.values()), max(row.sizes.values())
    return [scale.cell(spread), Text(f"{spread / highest:.0%}" if spread else "")]

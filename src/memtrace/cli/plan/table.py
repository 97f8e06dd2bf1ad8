"""A plan as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memtrace.cli.plan.rows import facts, gigabytes, headline, holding_rows, peak_rows, remedy_rows
from memtrace.exporters.table import CompositionBar, category_name, printable
from memtrace.planning.what_if.remedies import Remedy
from memtrace.record.categories import COLOURS, Moment
from memtrace.record.plan import Plan, Verdict

if TYPE_CHECKING:
    from memtrace.planning.by_module import Holding

_BAR_WIDTH = 24
_STYLES = {Verdict.FITS: "green", Verdict.UNCERTAIN: "yellow", Verdict.DOES_NOT_FIT: "bold"}


def plan_table(
    plan: Plan, found: list[Remedy] | None = None, holdings: Sequence[Holding] | None = None
) -> RenderableType:
    """Returns a plan as a rich renderable: the peak by category, the other moments, the verdict, what was assumed.

    Args:
        plan: the plan.
        found: remedies to list; None lists none.
        holdings: who made the activations; None lists none.
    """
    return Group(*_parts(plan, found, holdings))


def _parts(plan: Plan, found: list[Remedy] | None, holdings: Sequence[Holding] | None) -> Iterator[RenderableType]:
    yield Text(printable(headline(plan)), "bold")
    yield CompositionBar(plan.moments[Moment.PEAK].by_category())
    yield ""
    yield _peak_table(plan)
    yield ""
    yield _facts_grid(plan)
    if found is not None:
        yield ""
        yield _remedies_table(found) if found else Text("No remedy saves anything at the peak.")
    if holdings is not None:
        yield ""
        yield _holdings_table(holdings)
    yield ""
    for sentence in plan.assumptions:
        line = Table.grid(padding=(0, 1))
        line.add_row("·", printable(sentence), style="dim")
        yield line


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)


def _peak_table(plan: Plan) -> Table:
    rows = list(peak_rows(plan))
    largest = max((row.size for row in rows if row.category is not None), default=0)
    table = _table()
    table.add_column("peak", ratio=1, min_width=40, no_wrap=True)
    for head in ("GB", "GiB", "share"):
        table.add_column(head, justify="right", min_width=7, no_wrap=True)
    table.add_column("", max_width=_BAR_WIDTH)
    for row in rows:
        share = f"{row.share:.1%}" if row.size else ""
        if row.category is None:
            table.add_section()
            table.add_row("total", *gigabytes(row.size, plan.total_bytes), share, style="bold")
            continue
        title = category_name(row.category).append(f"  {printable(row.part)}", "dim")
        bar = Bar(largest, 0, row.size, color=COLOURS[row.category])
        table.add_row(title, *gigabytes(row.size, plan.total_bytes), share, bar)
    return table


def _facts_grid(plan: Plan) -> Table:
    grid = Table.grid(padding=(0, 2))
    device = None if plan.fit is None else plan.fit.device
    for name, said in facts(plan):
        style = _STYLES[plan.fit.verdict] if plan.fit is not None and name == device else ""
        grid.add_row(Text(printable(name), "bold"), Text(printable(said), style))
    return grid


def _holdings_table(holdings: Sequence[Holding]) -> Table:
    table = _table()
    table.add_column("made the activations at the end of the forward pass", ratio=1, min_width=30)
    for head in ("modules", "bytes", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, *figures in holding_rows(holdings):
        table.add_row(printable(name), *figures)
    return table


def _remedies_table(found: list[Remedy]) -> Table:
    rows = list(remedy_rows(found))
    table = _table()
    table.add_column("what if", ratio=1, min_width=30)
    table.add_column("saves at the peak", justify="right", no_wrap=True)
    table.add_column("leaves", justify="right", no_wrap=True)
    with_verdict = any(verdict for *_, verdict in rows)
    if with_verdict:
        table.add_column("then it", no_wrap=True)
    for *cells, verdict in rows:
        table.add_row(*cells, *([verdict] if with_verdict else []))
    return table

"""A plan as markdown, for issues and documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memtrace.cli.plan.rows import facts, gigabytes, headline, holding_rows, peak_rows, remedy_rows
from memtrace.planning.what_if.remedies import Remedy
from memtrace.record.plan import Plan

if TYPE_CHECKING:
    from memtrace.planning.by_module import Holding


def plan_markdown(plan: Plan, found: list[Remedy] | None = None, holdings: Sequence[Holding] | None = None) -> str:
    """Returns a plan as markdown: the same figures as the table, without colours."""
    return "\n".join(_lines(plan, found, holdings))


def _lines(plan: Plan, found: list[Remedy] | None, holdings: Sequence[Holding] | None) -> Iterator[str]:
    yield f"**{_escaped(headline(plan))}**"
    yield ""
    yield from _row(("at the peak", "", "GB", "GiB", "share"))
    yield "|---|---|--:|--:|--:|"
    for row in peak_rows(plan):
        share = f"{row.share:.1%}" if row.size else ""
        if row.category is None:
            total = ["total", "", *gigabytes(row.size, plan.total_bytes), share]
            yield from _row([f"**{cell}**" if cell else "" for cell in total])
        else:
            yield from _row((row.category.value, row.part, *gigabytes(row.size, plan.total_bytes), share))
    yield ""
    for name, said in facts(plan):
        yield f"- {_escaped(name)}: {_escaped(said)}"
    if found:
        yield ""
        yield from _row(("what if", "saves at the peak", "leaves", "then it"))
        yield "|---|--:|--:|---|"
        for cells in remedy_rows(found):
            yield from _row(cells)
    if holdings:
        yield ""
        yield from _row(("made the activations at the end of the forward pass", "modules", "bytes", "share"))
        yield "|---|--:|--:|--:|"
        for cells in holding_rows(holdings):
            yield from _row(cells)
    yield ""
    for sentence in plan.assumptions:
        yield f"- {_escaped(sentence)}"


def _row(cells: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(_escaped(cell, keep='*') for cell in cells)} |"


def _escaped(text: str, keep: str = "") -> str:
    """Returns a text in which nothing is markup, but for the characters to keep."""
    special = {character: f"\\{character}" for character in "\\`*|<[" if character not in keep}
    return "".join(special.get(character, character) if character.isprintable() else " " for character in text)

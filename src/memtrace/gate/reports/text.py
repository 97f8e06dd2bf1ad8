"""A check's report for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.gate.findings import Finding, Report, State
from memtrace.gate.reports.words import (
    change_words,
    gone_lines,
    headline,
    rest_words,
    shown_changes,
    summary,
    total_words,
    version_lines,
)


def text_report(report: Report) -> str:
    """Returns the report as lines: other versions first, then each case, then how many there are."""
    return "\n".join([*version_lines(report), *_cases(report), *gone_lines(report), summary(report)]) + "\n"


def details(finding: Finding) -> Iterator[str]:
    """Yields the totals of a case that differ, and what the largest differences come from."""
    for total in finding.totals:
        if total.growth:
            yield f"  {total_words(total)}"
    for moment, changes in shown_changes(finding):
        yield f"  at the {moment}"
        for change in changes:
            yield f"    {change_words(change)}"
    if rest_words(finding):
        yield f"    {rest_words(finding)}"


def _cases(report: Report) -> Iterator[str]:
    for finding in report.findings:
        yield headline(finding)
        if finding.state in (State.GREW, State.SHRANK, State.CHANGED):
            yield from details(finding)

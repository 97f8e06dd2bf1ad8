"""A check's report as markdown, for a comment on a pull request or the summary of a job."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.gate.findings import Change, Finding, Report, State, Total
from memtrace.gate.reports.words import (
    gone_lines,
    headline,
    rest_words,
    shown_changes,
    signed,
    summary,
    version_lines,
)
from memtrace.record.units import format_bytes

_GOOD = (State.UNCHANGED, State.SHRANK, State.CHANGED)


def markdown_report(report: Report) -> str:
    """Returns the report as markdown: a table of all cases, then what changed in each."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"**Memory of {summary(report)}**"
    yield ""
    for sentence in (*version_lines(report), *gone_lines(report)):
        yield f"- {_escaped(sentence)}"
        yield ""
    yield "| case | peak | before | difference | |"
    yield "|---|--:|--:|--:|---|"
    for finding in report.findings:
        peak = finding.totals[0] if finding.totals else None
        cells = (
            ("", "", "") if peak is None else (format_bytes(peak.now), format_bytes(peak.before), signed(peak.growth))
        )
        state = f"**{finding.state}**" if finding.state not in _GOOD else finding.state
        yield f"| {finding.case} | {' | '.join(cells)} | {state} |"
    for finding in report.findings:
        if finding.state is not State.UNCHANGED:
            yield ""
            yield from _case(finding)


def _case(finding: Finding) -> Iterator[str]:
    yield _escaped(headline(finding))
    rows = [
        (
            f"at the {moment}",
            _code(change.entry),
            _code(change.module) if change.module else "outside of the model",
            change,
        )
        for moment, changes in shown_changes(finding)
        for change in changes
    ]
    totals = [total for total in finding.totals if total.growth]
    if totals:
        yield ""
        yield "| total | now | before | difference |"
        yield "|---|--:|--:|--:|"
        for total in totals:
            yield f"| {total.name} | {_sizes(total)} |"
    if rows:
        yield ""
        yield "| | category | module | now | before | difference |"
        yield "|---|---|---|--:|--:|--:|"
        for when, entry, module, change in rows:
            yield f"| {when} | {entry} | {module} | {_sizes(change)} |"
    if rest_words(finding):
        yield ""
        yield rest_words(finding)


def _sizes(changed: Total | Change) -> str:
    return f"{format_bytes(changed.now)} | {format_bytes(changed.before)} | {signed(changed.growth)}"


def _code(text: str) -> str:
    """Returns a name in which nothing is markup; a code span cannot hold its own marks."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return f"`{printable.replace('`', chr(39))}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    special = {character: f"\\{character}" for character in "\\`*|<[_"}
    return "".join(special.get(character, character) if character.isprintable() else " " for character in text)

"""A check's report as GitHub's workflow commands, which become annotations of a pull request.

Their form: docs.github.com, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memtrace.gate.findings import Report, State
from memtrace.gate.reports.text import details
from memtrace.gate.reports.words import gone_lines, headline, summary, version_lines

_KINDS = {
    State.UNPLANNED: "error",
    State.NEW: "error",
    State.GREW: "error",
    State.SHRANK: "notice",
    State.CHANGED: "notice",
}
"""What a case becomes; one that is unchanged becomes nothing."""


def github_report(report: Report, path: str, lines: Mapping[str, int]) -> str:
    """Returns the report as workflow commands, and a last line for the log.

    Args:
        report: what was found.
        path: the file of cases, from the root of the repository.
        lines: where each case stands in it; a case that is not named stands at the first line.
    """
    return "\n".join([*_commands(report, path, lines), f"memtrace check, {summary(report)}"]) + "\n"


def _commands(report: Report, path: str, lines: Mapping[str, int]) -> Iterator[str]:
    for sentence in version_lines(report):
        yield _command("warning", path, 1, "memtrace: other versions", sentence)
    for finding in report.findings:
        if finding.state in _KINDS:
            title = f"memtrace: {finding.case} {finding.state}"
            message = "\n".join([headline(finding), *details(finding)])
            yield _command(_KINDS[finding.state], path, lines.get(finding.case, 1), title, message)
    for sentence in gone_lines(report):
        yield _command("notice", path, 1, "memtrace: not a case any more", sentence)


def _command(kind: str, path: str, line: int, title: str, message: str) -> str:
    return f"::{kind} file={_property(path)},line={line},title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

"""A check's report as JUnit's XML, which GitLab, Jenkins and others show as a table of tests."""

from __future__ import annotations

from xml.etree import ElementTree

from memtrace.gate.findings import Report, State
from memtrace.gate.reports.text import details
from memtrace.gate.reports.words import gone_lines, headline, version_lines

_FAILS = {State.GREW: "failure", State.UNPLANNED: "error", State.NEW: "error"}


def junit_report(report: Report) -> str:
    """Returns the report as one test suite with a test for each case; other versions stand in its output."""
    outcomes = [_FAILS.get(finding.state) for finding in report.findings]
    counts = {
        "tests": str(len(outcomes)),
        "failures": str(outcomes.count("failure")),
        "errors": str(outcomes.count("error")),
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "memtrace check", **counts, "skipped": "0"})
    for finding, outcome in zip(report.findings, outcomes, strict=True):
        test = ElementTree.SubElement(suite, "testcase", {"classname": "memtrace.check", "name": finding.case})
        said, more = _characters(headline(finding)), _characters("\n".join(details(finding)))
        if outcome is not None:
            wrong = ElementTree.SubElement(test, outcome, {"message": said, "type": str(finding.state)})
            wrong.text = more
        else:
            ElementTree.SubElement(test, "system-out").text = f"{said}\n{more}".strip()
    remarks = [*version_lines(report), *gone_lines(report)]
    if remarks:
        ElementTree.SubElement(suite, "system-out").text = _characters("\n".join(remarks))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _characters(text: str) -> str:
    """Returns the text without the characters that XML cannot hold."""
    return "".join(character if character in "\t\n" or character.isprintable() else "?" for character in text)

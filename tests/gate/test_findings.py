"""What is found between two results, and the forms in which it is said."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from memtrace.gate.baseline import Baseline
from memtrace.gate.cases import Case, Tolerance
from memtrace.gate.findings import Finding, Report, State, report_of
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.reports.github import github_report
from memtrace.gate.reports.junit import junit_report
from memtrace.gate.reports.markdown import markdown_report
from memtrace.gate.reports.text import text_report
from memtrace.gate.result import CaseResult
from memtrace.record.categories import Moment

MIB = 2**20
VERSIONS = {"memtrace": "1", "torch": "2.13.0"}


def result(*, head: int = 100, layers: int = 200, end: int = 100, reserved: int = 400) -> CaseResult:
    """A step with activations and weights at the peak, in MiB, and weights at its end."""
    return CaseResult(
        modules={
            Moment.PEAK: {
                "activations float32": {"head": head * MIB, "layers.*.mlp": layers * MIB},
                "weights trainable float32": {"head": 100 * MIB},
            },
            Moment.STEP_END: {"weights trainable float32": {"head": end * MIB}},
        },
        reserved_bytes=reserved * MIB,
    )


def found(outcome: Outcome, before: CaseResult | None, tolerance: Tolerance | None = None) -> Finding:
    case = Case(name="llama", config="llama.json", tolerance=tolerance or Tolerance())
    cases = {} if before is None else {"llama": before}
    report = report_of({"llama": case}, {"llama": outcome}, Baseline(versions=VERSIONS, cases=cases), VERSIONS)
    return report.findings[0]


@pytest.mark.parametrize(
    ("outcome", "before", "tolerance", "state"),
    [
        (result(), result(), Tolerance(), State.UNCHANGED),
        (result(head=101), result(), Tolerance(), State.GREW),
        (result(head=101), result(), Tolerance(nbytes=MIB), State.CHANGED),
        (result(head=104), result(), Tolerance(share=0.01), State.CHANGED),
        (result(head=105), result(), Tolerance(share=0.01), State.GREW),
        (result(head=99), result(), Tolerance(), State.SHRANK),
        (result(head=99, layers=201), result(), Tolerance(), State.CHANGED),
        (result(end=101), result(), Tolerance(), State.GREW),
        (result(reserved=402), result(), Tolerance(), State.GREW),
        (result(head=90, end=101), result(), Tolerance(), State.GREW),
        (result(), None, Tolerance(), State.NEW),
        (Unplanned(reason="no"), result(), Tolerance(), State.UNPLANNED),
    ],
)
def test_what_becomes_of_a_case(
    outcome: Outcome, before: CaseResult | None, tolerance: Tolerance, state: State
) -> None:
    """Any total may fail it: the peak, another moment, what is reserved."""
    finding = found(outcome, before, tolerance)
    assert finding.state is state
    status = Report(versions=(), findings=[finding]).exit_status
    assert status == {State.GREW: 1, State.NEW: 2, State.UNPLANNED: 2}.get(state, 0)


def test_changes_name_category_module_and_bytes() -> None:
    """Growth first; a difference that several moments show stands once, with the first whose total is over."""
    finding = found(result(head=110, layers=190, end=107), result())
    assert [(change.moment, change.entry, change.module, change.growth) for change in finding.changes] == [
        (Moment.STEP_END, "weights trainable float32", "head", 7 * MIB),
        (Moment.PEAK, "activations float32", "head", 10 * MIB),
        (Moment.PEAK, "activations float32", "layers.*.mlp", -10 * MIB),
    ]
    assert [(total.name, total.growth, total.is_over) for total in finding.totals] == [
        ("peak", 0, False),
        ("end of the step", 7 * MIB, True),
        ("reserved by the allocator", 0, False),
    ]


@pytest.fixture
def report() -> Report:
    """One case of each kind, another version and a case that is gone; the reason of one is hostile."""
    names = ("grew", "new", "same", "shrank", "wrong")
    cases = {name: Case(name=name, config="c.json") for name in names}
    before = {name: result() for name in ("grew", "gone", "same", "shrank", "wrong")}
    outcomes: dict[str, Outcome] = {
        "grew": result(head=356, layers=100),
        "new": result(),
        "same": result(),
        "shrank": result(head=50),
        "wrong": Unplanned(reason="100 % wrong:\n::error::<b>|`x`\x00"),
    }
    baseline = Baseline(versions={"torch": "2.13.0"}, cases=before)
    return report_of(cases, outcomes, baseline, {"torch": "2.14.1", "transformers": "5.23.0"})


def test_the_text_says_versions_first_and_whose_bytes_grew(report: Report) -> None:
    """Then each case in a line, its totals and its largest changes below, and how many there are at the end."""
    lines = text_report(report).splitlines()
    assert lines[:7] == [
        "the baseline was made with torch 2.13.0, this check with torch 2.14.1",
        "the baseline was made with transformers none, this check with transformers 5.23.0",
        "grew grew: peak 556.00 MiB, +156.00 MiB (+39.0 %), nothing allowed",
        "  peak 556.00 MiB, +156.00 MiB (+39.0 %)",
        "  at the peak",
        "    activations float32 of head: +256.00 MiB, 100.00 MiB before",
        "    activations float32 of layers.*.mlp: -100.00 MiB, 200.00 MiB before",
    ]
    assert "new is not in the baseline: memtrace check --update adds it" in lines
    assert "same is unchanged: 400.00 MiB at the peak" in lines
    assert lines[-2:] == [
        "gone is in the baseline and is no case any more: memtrace check --update drops it",
        "5 cases: 1 unchanged, 1 shrank, 1 grew, 1 not in the baseline, 1 cannot be planned",
    ]


def test_github_reads_its_commands_back(report: Report) -> None:
    """One command a line, whatever a message holds; the runner's own way to undo the escapes gives the message."""
    printed = github_report(report, "ci/memtrace.toml", {"grew": 4})
    lines = printed.splitlines()
    command = re.compile(r"::(error|warning|notice) file=([^,:]+),line=(\d+),title=([^,:]+)::(.*)")
    read = [match.groups() for line in lines[:-1] if (match := command.fullmatch(line))]
    assert len(read) == len(lines) - 1 == 7
    assert [kind for kind, *_ in read] == ["warning", "warning", "error", "error", "notice", "error", "notice"]
    _, path, line, title, message = read[2]
    assert (path, line, title.replace("%3A", ":")) == ("ci/memtrace.toml", "4", "memtrace: grew grew")
    said = message.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    assert "activations float32 of head: +256.00 MiB" in said and "(+39.0 %)" in said
    assert "::error::<b>" in read[5][-1] and "100 %25 wrong:%0A" in read[5][-1]


def test_markdown_is_a_table_in_which_nothing_is_markup(report: Report) -> None:
    """Every row of a table has as many cells as its head; text of others is escaped."""
    text = markdown_report(report)
    assert "| grew | 556.00 MiB | 400.00 MiB | +156.00 MiB | **grew** |" in text
    assert "| at the peak | `activations float32` | `layers.*.mlp` | 100.00 MiB | 200.00 MiB | -100.00 MiB |" in text
    assert "\\<b>\\|\\`x\\`" in text and "\x00" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for head, *rows in tables:
        assert {row.count(" | ") for row in rows[1:]} <= {head.count(" | ")}, head


def test_junit_is_read_by_a_parser(report: Report) -> None:
    """A test for each case, with the counts that its readers add up; the text is what the terminal shows."""
    suites = ElementTree.fromstring(junit_report(report).encode())
    (suite,) = suites
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "1", "2")
    tests = {test.get("name"): test for test in suite.iter("testcase")}
    assert [*tests] == ["grew", "new", "same", "shrank", "wrong"]
    failure = tests["grew"].find("failure")
    assert failure is not None and "activations float32 of head: +256.00 MiB" in (failure.text or "")
    assert tests["wrong"].find("error") is not None and tests["same"].find("failure") is None
    assert "torch 2.14.1" in (suite.findtext("system-out") or "")


JUNIT = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set(), {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package", "file"},
        {"name", "tests", "failures", "errors"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name", "classname", "time", "group"},
        {"name"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set(), set()),
    "error": ({"type", "message"}, set(), set()),
    "system-out": (set(), set(), set()),
}
"""What Jenkins reads, by its plugin's schema (junit-10.xsd): attributes that may be, those that must, and elements."""


def test_junit_has_nothing_that_jenkins_does_not_know(report: Report) -> None:
    """No other element or attribute, none missing, counts that are numbers, and text only where there may be some."""
    for element in ElementTree.fromstring(junit_report(report).encode()).iter():
        allowed, required, inside = JUNIT[element.tag]
        assert required <= set(element.keys()) <= allowed, element.tag
        assert {child.tag for child in element} <= inside, element.tag
        assert all(element.attrib[key].isdigit() for key in ("tests", "failures", "errors") if key in element.attrib)
        assert not inside or not (element.text or "").strip(), element.tag


def test_many_changes_are_cut_and_the_rest_is_counted() -> None:
    """The twelve largest are listed."""
    many = CaseResult(
        modules={Moment.PEAK: {"activations float32": {f"layer{at}": at * MIB for at in range(1, 21)}}},
        reserved_bytes=None,
    )
    none = CaseResult(modules={Moment.PEAK: {}}, reserved_bytes=None)
    finding = found(many, none)
    text = text_report(Report(versions=(), findings=[finding]))
    assert "layer20: +20.00 MiB" in text and "layer8:" not in text and "and 8 more, the smallest of them" in text

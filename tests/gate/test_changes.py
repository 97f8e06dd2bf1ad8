"""A repository whose code changes: what the gate finds of each change, category and module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memtrace.gate.baseline import Baseline, baseline_text
from memtrace.gate.case_file import read_case_file
from memtrace.gate.case_plan import plan_case
from memtrace.gate.findings import State, report_of
from memtrace.gate.reports.text import text_report
from memtrace.gate.result import CaseResult

REPOSITORY = Path(__file__).parent / "repository"

CHANGES = {
    "keeps the logits in float32": (
        "self.head(outputs.last_hidden_state)",
        "self.head(outputs.last_hidden_state).float()",
    ),
    "drops use_cache=False": (", use_cache=False", ""),
    "adds a layer": ("LAYERS = 2", "LAYERS = 3"),
    "changes nothing": ("outputs = self.body(", "states = outputs = self.body("),
}

FOUND = {
    "keeps the logits in float32": "    activations float32 of LanguageModel: +1.00 MiB, 0 B before",
    "drops use_cache=False": "    unattributed forward of body.layers.*.self_attn: +128.00 KiB, 0 B before",
    "adds a layer": "    weights trainable bfloat16 of body.layers.*.mlp.gate_proj: +16.00 KiB, 32.00 KiB before",
}

Planned = Callable[[str | None], CaseResult]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planned]:
    """Plans the repository's case after a change; the code is imported anew each time, as in a process of its own."""
    before = list(sys.path)

    def plan(change: str | None) -> CaseResult:
        directory = tmp_path_factory.mktemp("repository")
        code = (REPOSITORY / "network.py").read_text(encoding="utf-8")
        if change is not None:
            old, new = CHANGES[change]
            assert code.count(old) == 1
            code = code.replace(old, new)
        (directory / "network.py").write_text(code, encoding="utf-8")
        (directory / "memtrace.toml").write_text((REPOSITORY / "memtrace.toml").read_text(encoding="utf-8"))
        file = read_case_file(directory / "memtrace.toml")
        sys.modules.pop("network", None)
        return plan_case(file.cases["language-model"], file.root, file.python_path)

    yield plan
    sys.path[:] = before
    sys.modules.pop("network", None)


@pytest.fixture(scope="module")
def baseline(planned: Planned) -> Baseline:
    return Baseline(versions={}, cases={"language-model": planned(None)})


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_bytes_is_caught_and_no_other(planned: Planned, baseline: Baseline, change: str) -> None:
    """The report names the category and the module that grew; a change of nothing leaves every byte as it was."""
    cases = read_case_file(REPOSITORY / "memtrace.toml").cases
    report = report_of(cases, {"language-model": planned(change)}, baseline, {})
    text = text_report(report)
    if change in FOUND:
        assert report.exit_status == 1 and FOUND[change] in text.splitlines(), text
    else:
        assert report.exit_status == 0 and report.findings[0].state is State.UNCHANGED, text


def test_the_same_code_gives_the_same_bytes_after_whatever_ran(planned: Planned, baseline: Baseline) -> None:
    """Another model, garbage in cycles, many more objects: the text of the baseline is the same."""
    planned("adds a layer")
    cycles: list[object] = [[] for _ in range(10_000)]
    for cycle in cycles:
        assert isinstance(cycle, list)
        cycle.append(cycle)
    del cycles, cycle
    again = Baseline(versions={}, cases={"language-model": planned(None)})
    assert baseline_text(again) == baseline_text(baseline)

"""A search over versions whose plans are given; what it keeps, and how it ends."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from memtrace.errors import OutputError, PlanError
from memtrace.gate import planner, processes
from memtrace.gate.case_file import CaseFile
from memtrace.gate.cases import Case
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import CaseResult
from memtrace.gate.versions import elsewhere
from memtrace.gate.versions.elsewhere import plan_elsewhere
from memtrace.gate.versions.kept import KeptOutcomes, state_of
from memtrace.gate.versions.search import Found, Search
from memtrace.record.categories import Moment

CASE = Case(name="case", config="configs/llama.json", padded=True, lora_rank=8)


@dataclass
class Given:
    """Versions whose outcomes are given: bytes, the reason of a refusal, or an exception that planning raises."""

    outcomes: dict[str, int | str | BaseException]
    planned: list[str] = field(default_factory=list)

    def key(self, case: Case, version: str) -> str:
        return f"{case.name}-{version}"

    def plan(self, case: Case, version: str) -> Outcome:
        self.planned.append(version)
        outcome = self.outcomes[version]
        if isinstance(outcome, BaseException):
            raise outcome
        return Unplanned(reason=outcome) if isinstance(outcome, str) else result(outcome)


def result(nbytes: int) -> CaseResult:
    return CaseResult(modules={Moment.PEAK: {"weights trainable float32": {"model": nbytes}}}, reserved_bytes=None)


def search(given: Given, directory: Path) -> Found:
    return Search(case=CASE, versions=given, kept=KeptOutcomes(directory), say=lambda *_: None).run([*given.outcomes])


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was planned, or refused by the plan, is kept; what could not be installed, or ended, is tried again."""
    outcomes = {"a": 1, "b": PlanError("no network"), "c": KeyboardInterrupt(), "d": "no such model", "e": 1, "f": 5}
    given = Given(outcomes)
    with pytest.raises(KeyboardInterrupt):
        search(given, tmp_path)
    assert given.planned == ["a", "f", "c"]
    given = Given(outcomes | {"c": "its process ended with signal 9"})
    found = search(given, tmp_path)
    assert given.planned == ["c", "d", "b", "e"]
    assert found.jump is not None and (found.jump.before, found.jump.after) == ("e", "f")
    given = Given(outcomes | {"c": 1})
    found = search(given, tmp_path)
    assert given.planned == ["c"]
    assert found.jump is not None and (found.jump.before, found.jump.after, found.jump.skipped) == ("e", "f", ())


def test_a_version_at_an_end_that_cannot_be_planned_ends_the_search(tmp_path: Path) -> None:
    given = Given({"a": 1, "b": 2, "c": "it cannot"})
    with pytest.raises(PlanError, match="c cannot be planned, so there is nothing to compare with: it cannot"):
        search(given, tmp_path)
    assert given.planned == ["a", "c"]


def test_what_was_kept_and_can_no_longer_be_read_is_planned_again(tmp_path: Path) -> None:
    kept = KeptOutcomes(tmp_path / "outcomes")
    assert kept.find("name") is None
    kept.keep("name", result(7))
    assert kept.find("name") == result(7)
    (tmp_path / "outcomes" / "name.json").write_text("{")
    assert kept.find("name") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another directory with --cache"):
        KeptOutcomes(tmp_path / "file").keep("name", result(7))


def test_the_state_of_code_changes_with_its_contents_alone(tmp_path: Path) -> None:
    """Not with its age, nor with what is no code, hidden, or installed."""
    (tmp_path / "code.py").write_text("one")
    before = state_of([tmp_path])
    (tmp_path / "code.py").write_text("one")
    (tmp_path / "weights.bin").write_text("of no interest")
    for name in (".venv", "__pycache__", "build"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("of no interest")
    assert state_of([tmp_path]) == before
    (tmp_path / "settings.json").write_text("{}")
    assert state_of([tmp_path]) != before
    assert state_of([tmp_path / "code.py"]) == state_of([tmp_path / "code.py", tmp_path / "no such file"])


def test_a_case_is_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths lead to the same files, whatever their names have in them."""
    root = tmp_path / 'a "quoted" directory \\ of ümlauts'
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "llama.json").write_text("{}")
    read = []

    monkeypatch.setattr(elsewhere, "plan_cases", lambda file, **options: read.append(file) or {})
    plan_elsewhere([CASE], root, [root], [])
    (file,) = read
    assert file.python_path == (root,)
    assert file.cases["case"] == Case(name="case", config=str(root / CASE.config), padded=True, lora_rank=8)


def test_a_process_that_ended_is_told_with_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the process that plans; the one that could not begin ends the trial."""
    see = "; see what it printed"
    assert see in inspect.getsource(planner) and see in inspect.getsource(processes)

    def plan(file: CaseFile, *, printed: IO[bytes], **options: object) -> dict[str, Outcome]:
        printed.write(b"Traceback\n  ImportError: too old\n\n")
        return {"case": Unplanned(reason=f"its process ended with status 1 before there was a plan{see}")}

    monkeypatch.setattr(elsewhere, "plan_cases", plan)
    (outcome,) = plan_elsewhere([CASE], tmp_path, [], []).values()
    assert isinstance(outcome, Unplanned) and elsewhere.has_ended(outcome)
    assert outcome.reason == "its process ended with status 1 before there was a plan: ImportError: too old"

    def fail(file: CaseFile, **options: object) -> dict[str, Outcome]:
        raise OutputError(f"the process that plans ended with status 1{see}")

    monkeypatch.setattr(elsewhere, "plan_cases", fail)
    with pytest.raises(PlanError, match=r"the process that plans ended with status 1$"):
        plan_elsewhere([CASE], tmp_path, [], [])

"""`memtrace check` as a repository runs it: in processes of its own, on a network that needs torch alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checked_repository import check, write

from memtrace.cli import main
from memtrace.errors import LogFormatError
from memtrace.gate.baseline import read_baseline
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import CaseResult
from memtrace.record.categories import Moment

pytestmark = pytest.mark.xdist_group("checked repository")


def test_the_baseline_is_sorted_and_a_line_changes_with_a_category(repository: Path) -> None:
    """One number a line, so that a diff shows what changed and nothing else; it names the versions that made it."""
    text = (repository / "memtrace-baseline.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert text == json.dumps(document, indent=1, sort_keys=True) + "\n"
    assert document["schema"] == "memtrace.baseline/1" and {"memtrace", "torch"} <= set(document["versions"])
    first = document["cases"]["first"]
    assert first["moments"]["peak"]["weights trainable float32"] == 4 * (2 * 64 * 256 + 256 + 64)
    assert first["modules"]["peak"]["weights trainable float32"] == {"0": 4 * 65 * 256, "2": 4 * 257 * 64}
    assert "weights trainable float32" in first["moments"]["step_end"], "its modules are those of the peak"
    assert "weights trainable float32" not in first["modules"]["step_end"]
    assert first["peak_bytes"] == sum(first["moments"]["peak"].values())
    assert [path.name for path in repository.glob(".*baseline*")] == []


def test_bytes_are_the_same_in_any_process(repository: Path) -> None:
    """Another seed of hashes, another number of threads, one at a time: the very text of the baseline."""
    options = ("--json", "--jobs", "1", "--case", "second", "--case", "first")
    ended = check(repository, *options, PYTHONHASHSEED="77", OMP_NUM_THREADS="2")
    written = (repository / "memtrace-baseline.json").read_text(encoding="utf-8")
    assert ended.stdout == written, ended.stderr
    assert json.loads(written)["cases"]["first"] == json.loads(written)["cases"]["second"]


def test_a_case_without_a_plan_leaves_the_others_theirs(repository: Path, tmp_path: Path) -> None:
    """Code that raises, code that ends its process, no such function: exit status 2, each with its reason."""
    write(tmp_path, good="build", leaves="leaves", lost="nobody", none="batch", refuses="refuses")
    before = (repository / "memtrace-baseline.json").read_text(encoding="utf-8").replace('"first": {', '"good": {')
    (tmp_path / "memtrace-baseline.json").write_text(before, encoding="utf-8")
    ended = check(tmp_path)
    assert ended.returncode == 2
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("good is unchanged: ")
    assert lines[1].startswith("leaves cannot be planned: its process ended with status 3 before there was a plan")
    assert lines[2].endswith("build must name a function, and network has no nobody")
    assert lines[3].endswith("build must return a torch.nn.Module: network:batch returned a Tensor")
    assert lines[4] == "refuses cannot be planned: the model cannot be made: ValueError: no such width"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--case", "third"], "has no case 'third', only first, second"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--format", "html"], "--format must be one of text, github, markdown, junit, or such as junit=report.xml"),
        (["--baseline", "absent.json"], "there is no baseline absent.json: memtrace check --update writes it"),
        (["--file", "absent.toml"], "absent.toml cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_planned(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    """Exit status 2, and a message that names the mistake."""
    monkeypatch.chdir(repository)
    assert main(["check", *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-20], "must be one JSON value"),
        (lambda text: text.replace("baseline/1", "plan/1"), "schema must be 'memtrace.baseline/1'"),
        (lambda text: text.replace('"peak_bytes": ', '"peak_bytes": 1'), "cases.first does not add up"),
        (lambda text: text.replace('"0": ', '"0": 1'), "cases.first does not add up"),
        (lambda text: text.replace('"peak_bytes": ', '"peak_bytes": -'), "must be an integer"),
        (lambda text: text.replace('"peak": {', '"summit": {'), "must be one of"),
        (lambda text: text.replace('"versions": {', '"versions": [], "x": {'), "versions must be an object"),
        (lambda text: "<<<<<<< ours\n" + text, "must be one JSON value"),
    ],
)
def test_a_baseline_that_is_wrong_is_refused(repository: Path, tmp_path: Path, change, said: str) -> None:
    """Cut, merged by hand, of another kind: the message names the place."""
    path = tmp_path / "baseline.json"
    path.write_text(change((repository / "memtrace-baseline.json").read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(LogFormatError, match=said):
        read_baseline(path)


def test_one_case_is_updated_alone_where_the_versions_are_the_same(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then its lines change and no others; with other versions, or without a plan of one, nothing is written."""
    write(tmp_path, first="build", second="build")
    path = tmp_path / "memtrace-baseline.json"
    path.write_bytes((repository / "memtrace-baseline.json").read_bytes())
    before = read_baseline(path)
    planned: dict[str, Outcome] = {
        "second": CaseResult(modules={Moment.PEAK: {"inputs": {"": 1}}}, reserved_bytes=None)
    }
    monkeypatch.setattr("memtrace.cli.check.plan_cases", lambda *_: planned)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--update", "--case", "second"]) == 0
    assert read_baseline(path).cases == {"first": before.cases["first"], "second": planned["second"]}
    text = path.read_text().replace('"torch": "', '"torch": "0.')
    path.write_text(text, encoding="utf-8")
    assert main(["check", "--update", "--case", "second"]) == 2
    assert "made with other versions: update all cases at once" in capsys.readouterr().err
    assert main(["check", "--case", "second"]) == 0
    assert capsys.readouterr().out.startswith("the baseline was made with torch 0.")
    planned["first"] = Unplanned(reason="no such width")
    assert main(["check", "--update"]) == 2
    assert "case first cannot be planned: no such width" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == text, "nothing was written"
    path.unlink()
    del planned["first"]
    assert main(["check", "--update", "--case", "second"]) == 0
    assert read_baseline(path).cases == planned, "the first baseline may be one of some cases"

"""`memtrace show` on logs and run directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from records import counted_step, traced_step

from memtrace.cli import main
from memtrace.exporters.ranks import ranks_table
from memtrace.exporters.run_directory.json_lines import rotated_path
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.exporters.table import TABLE_WIDTH, plain_text, render_text
from memtrace.record.breakdown import StepRecord


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of the terminal that runs the tests must not matter."""
    monkeypatch.delenv("COLUMNS", raising=False)


def write(path: Path, *records: StepRecord) -> Path:
    with StepLog(path) as log:
        for record in records:
            log.write(record)
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Returns what `memtrace show` prints, without the blanks at the ends of lines."""
    assert main(["show", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return "\n".join(line.rstrip() for line in printed.out.splitlines())


def test_the_last_step_with_a_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the newest step whose peak is known is shown, not the counted ones after it."""
    log = write(tmp_path / "log.jsonl", traced_step(step=1), traced_step(step=2), counted_step(step=3))
    assert shown(capsys, log) == render_text(traced_step(step=2))


def test_a_log_without_peaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no peak is known, the newest step is shown."""
    log = write(tmp_path / "log.jsonl", counted_step(step=1), counted_step(step=2))
    assert shown(capsys, log) == render_text(counted_step(step=2))


def test_a_step_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--step` shows that step, counted or not; where a run was repeated, its last version."""
    first, again = counted_step(step=1), counted_step(step=1, self_seconds=0.5)
    log = write(tmp_path / "log.jsonl", first, traced_step(step=2), again)
    assert shown(capsys, log, "--step", 1) == render_text(again)


def test_a_directory_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one process is shown as its one table."""
    write(step_log_path(tmp_path, 0), traced_step(rank=0))
    assert shown(capsys, tmp_path) == render_text(traced_step(rank=0))


def test_a_directory_of_several_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All ranks stand side by side, in the order of their numbers, at the newest step that all of them know."""
    for rank in (10, 2, 0):
        write(step_log_path(tmp_path, rank), *(traced_step(rank=rank, step=step) for step in (1, 2)))
    write(step_log_path(tmp_path, 0), traced_step(rank=0, step=3))
    (tmp_path / "notes.txt").write_text("not a log")
    expected = {rank: traced_step(rank=rank, step=2) for rank in (0, 2, 10)}
    assert shown(capsys, tmp_path) == plain_text(ranks_table(expected))


def test_one_rank_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--rank` shows the table of that rank."""
    for rank in (0, 1):
        write(step_log_path(tmp_path, rank), traced_step(rank=rank))
    assert shown(capsys, tmp_path, "--rank", 1) == render_text(traced_step(rank=1))


def test_ranks_without_a_common_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the ranks share no step with a peak, each shows its newest, and the headline says so."""
    for rank in (0, 1):
        write(step_log_path(tmp_path, rank), traced_step(rank=rank, step=rank + 1))
    assert "2 ranks · steps 1 to 2: the ranks share none" in shown(capsys, tmp_path)


def test_a_rank_that_has_not_begun_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty log does not keep the others from being shown."""
    write(step_log_path(tmp_path, 0), traced_step(rank=0))
    write(step_log_path(tmp_path, 1))
    assert shown(capsys, tmp_path) == render_text(traced_step(rank=0))


def test_a_log_of_which_only_the_older_part_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory is read in the middle of a rotation, too."""
    write(rotated_path(step_log_path(tmp_path, 0)), traced_step(rank=0))
    assert shown(capsys, tmp_path) == render_text(traced_step(rank=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: there is no such step log"),
        (
            ["empty"],
            "empty: there is no step log in this directory or one below, no steps-rank<R>.jsonl; "
            "`memtrace runs empty` lists those further down",
        ),
        (["begun.jsonl"], "begun.jsonl: there is no finished step yet"),
        (["run", "--rank", "7"], "run has no log of rank 7"),
        (["run", "--step", "7"], "run/steps-rank0.jsonl has no step 7; its last one is step 12"),
        (["plan.json"], "plan.json:1: schema must be 'memtrace.step/1', got 'memtrace.plan/1'"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """What cannot be shown is told in one line on stderr, with exit status 2."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(Path("begun.jsonl"))
    write(step_log_path("run", 0), traced_step())
    Path("plan.json").write_text('{"schema": "memtrace.plan/1"}\n')
    assert main(["show", *arguments]) == 2
    assert capsys.readouterr() == ("", f"memtrace: {message}\n")


def test_show_does_not_load_torch(tmp_path: Path) -> None:
    """Looking at a log needs no torch, and so takes no seconds."""
    write(step_log_path(tmp_path, 0), traced_step())
    script = "import sys; from memtrace.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "show", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "False"


def test_an_output_that_knows_no_signs(tmp_path: Path) -> None:
    """On an ASCII output the figures come all the same."""
    write(step_log_path(tmp_path, 0), traced_step())
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "memtrace", "show", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    assert b"optimizer_state" in done.stdout
    assert done.stdout.isascii()


def test_output_that_is_no_terminal_is_wide_and_plain(tmp_path: Path) -> None:
    """Piped, the table has its full width and no control sequence."""
    write(step_log_path(tmp_path, 0), traced_step())
    command = [sys.executable, "-m", "memtrace", "show", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "\x1b" not in printed
    assert "\n".join(line.rstrip() for line in printed.splitlines()) == render_text(traced_step(), TABLE_WIDTH)


def test_the_directory_above_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trainer's output directory stands for the log in it, also where that is a link; of several one must be named."""
    write(step_log_path(tmp_path / "out" / "_memtrace", 0), traced_step())
    (tmp_path / "out" / "memtrace").symlink_to("_memtrace", target_is_directory=True)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    for command in (["show"], ["watch", "--once"], ["report", "-o", str(tmp_path / "page.html")]):
        assert main([*command, str(tmp_path / "out")]) == 0
    assert "<h1>out</h1>" in (tmp_path / "page.html").read_text()
    for number in range(6):
        write(step_log_path(tmp_path / "out" / f"run-{number}", 0), traced_step())
        os.utime(tmp_path / "out" / f"run-{number}", (number, number))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out")]) == 2
    named = ", ".join(str(tmp_path / "out" / name) for name in ("_memtrace", "run-5", "run-4", "run-3", "run-2"))
    end = f"several directories below it have step logs, name one of them: {named}, and others\n"
    assert capsys.readouterr().err.endswith(end)

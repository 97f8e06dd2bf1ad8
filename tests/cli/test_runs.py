"""`memtrace runs`: the catalogue of the runs below a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from records import GIB, traced_step
from small_training import make, step

from memtrace import MemoryTracer
from memtrace.cli import main
from memtrace.exporters.run_directory.run_catalogue import find_runs
from memtrace.exporters.run_directory.run_file import RunFile, run_file_path
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.record.snapshot import RunIdentity, RunState


def make_run(
    directory: Path, name: str, state: RunState, *, peak: int = 2 * GIB, run_id: str = "a", rank: int = 0, ooms: int = 0
) -> None:
    """Leaves the run file of a rank that took 12 steps."""
    directory.mkdir(parents=True, exist_ok=True)
    identity = RunIdentity(run_name=name, run_id=run_id, rank=rank, world_size=2, model="Llama")
    file = RunFile(run_file_path(directory, rank), identity, None)
    full = traced_step(rank=rank, run_id=run_id)
    moments = {moment: replace(found, allocated_bytes=peak) for moment, found in full.moments.items()}
    file.step(traced_step(rank=rank, run_id=run_id, moments=moments))
    for _ in range(ooms):
        file.count_oom()
    file.end(state)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["runs", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memtrace.runs/1"
    return list(document["runs"])


def test_real_runs_are_listed_with_model_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that has ended, and one that was ended by an exception; figures are those of the last step."""
    model, optimizer = make()
    settings = {"port": None, "strict": True, "quiet": True, "trace_every": 1, "device_poll_seconds": 0}
    with MemoryTracer(model, optimizer, log_dir=tmp_path / "x" / "good", run_name="good", **settings) as tracer:
        for rows in (6, 48, 6):
            step(model, optimizer, rows)
    history = tracer.history
    with (
        pytest.raises(ValueError, match="over"),
        MemoryTracer(model, optimizer, log_dir=tmp_path / "bad", run_name="run", **settings),
    ):
        step(model, optimizer, 6)
        raise ValueError("over")
    bad, good = listed(capsys, str(tmp_path))
    assert (bad["name"], bad["ended"], good["ended"], good["model"]) == ("run", "ended by an exception", "ended", "Net")
    figures = good["figures"]
    assert isinstance(figures, dict)
    assert figures["last_step"] == 3
    assert figures["peak_bytes"] == max(record.moments["peak"].held_bytes for record in history)
    assert figures["peak_bytes"] < figures["capacity_bytes"]
    assert main(["runs", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "run in bad Net 1 1" in printed
    assert "good in x/good Net 1 3" in printed


def test_the_order_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest first by default; what is not known comes last."""
    for name, peak, ooms in (("b", GIB, 0), ("a", 60 * GIB, 2), ("c", 30 * GIB, 1)):
        make_run(tmp_path / name, name, RunState.OK, peak=peak, ooms=ooms)
    with StepLog(step_log_path(tmp_path / "old", 0)) as log:
        log.write(traced_step(moments={}, unix_seconds=1000.0, batch=None))
    orders = {"when": "cabold", "name": "abcold", "peak": "acbold", "headroom": "acbold", "ooms": "acbold"}
    for order, names in orders.items():
        assert "".join(str(run["name"]) for run in listed(capsys, str(tmp_path), "--sort", order)) == names, order


def test_the_ranks_of_the_newest_launch_are_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fullest rank's peak, the OOMs of all, and the worst of their ends; an earlier launch is left out."""
    with mock.patch("memtrace.exporters.run_directory.run_file.time.time", return_value=1000.0):
        make_run(tmp_path, "r", RunState.EXCEPTION, run_id="before", rank=2, peak=70 * GIB)
    make_run(tmp_path, "r", RunState.SIGNAL, rank=0, ooms=1)
    make_run(tmp_path, "r", RunState.OUT_OF_MEMORY, rank=1, peak=40 * GIB, ooms=1)
    (run,) = listed(capsys, str(tmp_path))
    assert (run["ranks"], run["world_size"], run["ended"]) == (2, 2, "ended out of memory")
    assert run["figures"] == {"last_step": 12, "ooms": 2, "peak_bytes": 40 * GIB, "capacity_bytes": 76 * GIB}
    assert run["headroom_ratio"] == pytest.approx(1 - 40 / 76)


def _no_file(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)
    os.mkfifo(path.with_name("steps-rank1.jsonl"))


def _foreign(path: Path) -> None:
    path.write_text('{"schema": "else"}')


def _torn(path: Path) -> None:
    path.write_bytes(b'{"schema": "memtrace.run/1", "run": "\xff')


def _wrong_figures(path: Path) -> None:
    make_run(path.parent / "made", "r", RunState.OK)
    text = (path.parent / "made" / "run-rank0.json").read_text()
    path.write_text(text.replace('"ooms": 0', '"ooms": "none"'))


@pytest.mark.parametrize("spoil", [_no_file, _pipe, _foreign, _torn, _wrong_figures])
def test_what_is_broken_or_of_others_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    """The runs beside it are listed; a run whose file is broken is known by its log."""
    broken = tmp_path / "broken"
    broken.mkdir()
    spoil(broken / "run-rank0.json")
    (broken / "steps-rank0.jsonl").write_text("no JSON\n" * 10)
    make_run(tmp_path / "fine", "fine", RunState.OK)
    assert [run["name"] for run in listed(capsys, str(tmp_path / "fine"))] == ["fine"]
    names = {run["name"] for run in listed(capsys, str(tmp_path))}
    assert names - {"r"} == {"fine"}
    with StepLog(step_log_path(broken, 0)) as log:
        log.write(traced_step(rank=0))
    assert {run["name"] for run in listed(capsys, str(tmp_path))} - {"r"} == {"fine", "broken"}


def test_a_link_and_a_hidden_directory_are_not_entered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link back up would never end, and Trainer's own link would list a run twice."""
    make_run(tmp_path / "out" / "_memtrace", "r", RunState.OK)
    make_run(tmp_path / ".cache", "hidden", RunState.OK)
    (tmp_path / "out" / "memtrace").symlink_to("_memtrace")
    (tmp_path / "out" / "up").symlink_to(tmp_path)
    assert len(listed(capsys, str(tmp_path))) == 1
    assert main(["runs", str(tmp_path / "gone")]) == 2
    assert "gone: the directory cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 2
    assert "there is no run in this directory or below it" in capsys.readouterr().err
    assert listed(capsys, str(tmp_path / "empty")) == []


def test_a_thousand_runs_cost_no_log(tmp_path: Path) -> None:
    """Each has a step log of some megabytes, of which nothing is read: its run file says all."""
    make_run(tmp_path / "0", "r", RunState.OK)
    text = (tmp_path / "0" / "run-rank0.json").read_bytes()
    for number in range(1000):
        directory = tmp_path / str(number)
        directory.mkdir(exist_ok=True)
        (directory / "run-rank0.json").write_bytes(text)
        log = directory / "steps-rank0.jsonl"
        log.touch()
        os.truncate(log, 8 * 2**20)
    opened: list[object] = []
    real = Path.open
    with mock.patch.object(
        Path, "open", lambda self, *args, **named: (opened.append(self), real(self, *args, **named))[1]
    ):
        assert sum(1 for _ in find_runs(tmp_path)) == 1000
    assert [path for path in opened if str(path).endswith(".jsonl")] == []


def test_the_end_of_a_log_stands_for_figures_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a run that was killed in its first seconds, and of older versions; of a long log only the end is read."""
    directory = tmp_path / "killed"
    with StepLog(step_log_path(directory, 0)) as log:
        for number in range(1, 400):
            log.write(traced_step(step=number, rank=0, run_id="a"))
    assert log.path.stat().st_size > 3 * 128 * 1024
    RunFile(run_file_path(directory, 0), RunIdentity(run_name="killed", run_id="a"), None)
    (run,) = listed(capsys, str(tmp_path))
    assert run["figures"]["last_step"] == 399  # type: ignore[index]
    assert run["figures"]["peak_bytes"] == traced_step().moments["peak"].held_bytes  # type: ignore[index]
    assert run["ended"] == "running"

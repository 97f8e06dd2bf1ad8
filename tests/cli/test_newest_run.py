"""A directory in which a script has run more than once shows its newest run."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import traced_step

from memtrace.cli import main
from memtrace.cli.report import read_run
from memtrace.cli.show import choose_records, find_logs
from memtrace.exporters.run_directory.run_file import RunFile, run_file_path
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.record.snapshot import RunIdentity, RunState


def write(directory: Path, rank: int, run_id: str, steps: range, begun: float) -> None:
    with StepLog(step_log_path(directory, rank)) as log:
        for step in steps:
            log.write(traced_step(step=step, rank=rank, run_id=run_id, unix_seconds=begun + step))


def test_a_rerun_does_not_mix_with_the_run_before(tmp_path: Path) -> None:
    """Not by its higher steps, not by a rank that the newer run does not have; in logs of older versions too."""
    for first, second in (("a", "b"), ("", "")):
        directory = tmp_path / f"run{first}"
        for rank in (0, 1):
            write(directory, rank, first, range(1, 10), begun=1000.0)
        write(directory, 0, second, range(1, 4), begun=5000.0)
        chosen = choose_records(find_logs(directory), None)
        assert {rank: (record.step, record.run_id) for rank, record in chosen.items()} == {0: (3, second)}
        (history,) = read_run(directory, None, None).ranks
        assert [step.record.step for step in history.steps] == [1, 2, 3]


def test_a_run_that_goes_on_from_a_checkpoint_is_another_run(tmp_path: Path) -> None:
    """The count of steps goes on; the launch tells."""
    write(tmp_path, 0, "a", range(1, 6), begun=1000.0)
    write(tmp_path, 0, "b", range(6, 8), begun=2000.0)
    assert [step.record.step for step in read_run(tmp_path, None, None).ranks[0].steps] == [6, 7]


def test_watch_says_how_each_rank_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks that have ended alike share a line; `show` leaves out those that have ended well."""
    for rank, state in enumerate((RunState.OK, RunState.OK, RunState.OUT_OF_MEMORY)):
        write(tmp_path, rank, "a", range(1, 3), begun=1000.0)
        RunFile(run_file_path(tmp_path, rank), RunIdentity(run_name="r", run_id="a", rank=rank), None).end(state)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    watched = capsys.readouterr().out
    assert "ranks 0, 1 of r: ended (launch a)" in watched
    assert "rank 2 of r: ended out of memory (launch a)" in watched
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ranks 0, 1" not in shown
    assert "rank 2 of r: ended out of memory (launch a)" in shown

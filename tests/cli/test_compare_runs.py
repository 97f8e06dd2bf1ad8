"""`memtrace compare RUN_A RUN_B`: steps of equal shape, what grew, and the exit status over a threshold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from records import GIB, PEAK_ENTRIES, breakdown, counted_step, traced_step

from memtrace.cli import main
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.record.breakdown import BatchShape, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment

ACTIVATIONS = EntryKey(Category.ACTIVATIONS, "", "bfloat16")
UNATTRIBUTED = EntryKey(Category.UNATTRIBUTED, "forward", "")


def batch(rows: int, tokens: int) -> BatchShape:
    return BatchShape(shape=(rows, tokens), tokens=rows * tokens, largest_micro_batch_tokens=rows * tokens)


def with_peak(shape: BatchShape | None, entries: dict[EntryKey, int], **fields: object) -> StepRecord:
    return traced_step(batch=shape, moments={Moment.PEAK: breakdown(Moment.PEAK, entries)}, **fields)


def write(directory: Path, records: Iterable[StepRecord]) -> Path:
    for record in records:
        with StepLog(step_log_path(directory, record.rank)) as log:
            log.write(record)
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Two runs of two ranks; in the second one rank 1 holds 1 GiB more in batches of 8 x 512, and nobody claims it."""
    grown = PEAK_ENTRIES | {UNATTRIBUTED: GIB, ACTIVATIONS: 2 * GIB + GIB // 2}
    first, second = [], []
    for rank in (0, 1):
        for number, shape in enumerate((batch(8, 512), batch(4, 512), batch(2, 100 + rank)), 1):
            first.append(with_peak(shape, PEAK_ENTRIES, step=number, rank=rank))
            leaks = rank == 1 and number == 1
            second.append(with_peak(shape, grown if leaks else PEAK_ENTRIES, step=10 + number, rank=rank))
        second.append(counted_step(step=20, rank=rank))
    return str(write(tmp_path / "a", first)), str(write(tmp_path / "b", second))


def test_what_grew_is_said_first(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The step whose peak grew most in full, whichever rank it is of; the peaks of the others below it."""
    assert main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "step 1 · B" in words
    assert "step 11 rank 1 · batch 8 x 512 · peak +512.00 MiB: unattributed +1.00 GiB, activations -512.00 MiB" in words
    rows = {row[0]: row[1:] for row in (line.replace("■", "").split() for line in printed.splitlines()) if row}
    assert " ".join(rows["unattributed"]) == "0 B 1.00 GiB +1.00 GiB"
    assert " ".join(rows["activations"]) == "3.00 GiB 2.50 GiB -512.00 MiB -16.7%"
    assert " ".join(rows["weights"]) == "2.00 GiB 2.00 GiB 0 B +0.0%"
    others = [line.split() for line in printed.splitlines() if "batch" in line.split()][1:]
    assert {(row[1], " ".join(row[3:6])) for row in others} == {
        ("0,", "8 x 512"), ("0,", "4 x 512"), ("1,", "4 x 512"), ("0,", "2 x 100"), ("1,", "2 x 101"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("threshold", "status"),
    [("512MiB", 0), ("511MiB", 1), ("5%", 0), ("1%", 1), ("0%", 1), ("0", 1)],
)
def test_a_peak_that_grew_by_more_is_status_1(runs: tuple[str, str], threshold: str, status: int) -> None:
    """By a size, or as a share of the first; a run against itself grows by nothing."""
    assert main(["compare", *runs, "--fail-above", threshold]) == status
    assert main(["compare", runs[0], runs[0], "--fail-above", threshold]) == 0
    assert main(["compare", runs[1], runs[0], "--fail-above", threshold]) == 0
    assert main(["compare", *runs, "--rank", "0", "--fail-above", threshold]) == 0


def test_json_has_every_step_to_the_byte(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Rank, batch and both steps, with each moment that both know."""
    assert main(["compare", *runs, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memtrace.run_comparison/1"
    assert len(document["steps"]) == 6
    worst = document["steps"][0]
    assert (worst["rank"], worst["batch"], worst["first_step"], worst["second_step"]) == (1, [8, 512], 1, 11)
    assert worst["peak"]["difference_bytes"] == GIB // 2
    by_name = {row["category"]: row["difference_bytes"] for row in worst["moments"]["peak"]}
    assert by_name["unattributed"] == GIB
    assert by_name["activations"] == -GIB // 2
    assert by_name["total"] == sum(size for name, size in by_name.items() if name != "total")


def test_a_step_without_optimizer_state_is_another_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shape that occurred only before the optimizer had state is not held against one after it."""
    early = {key: size for key, size in PEAK_ENTRIES.items() if key.category is not Category.OPTIMIZER_STATE}
    first = [
        with_peak(batch(1, 9), early, step=1),
        with_peak(batch(2, 9), early, step=2),
        with_peak(batch(2, 9), PEAK_ENTRIES, step=3),
    ]
    second = [with_peak(batch(1, 9), PEAK_ENTRIES, step=4), with_peak(batch(2, 9), PEAK_ENTRIES, step=5)]
    runs = [str(write(tmp_path / "a", first)), str(write(tmp_path / "b", second))]
    assert main(["compare", *runs, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["batch"], step["peak"]["difference_bytes"]) for step in steps] == [([2, 9], 0)]


def test_runs_without_a_shape_in_common_say_which_they_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And that a step can be named; then any two are compared, and their batches are named."""
    first = write(tmp_path / "a", [with_peak(batch(1, 9), PEAK_ENTRIES, step=3)])
    second = write(tmp_path / "b", [with_peak(None, PEAK_ENTRIES, step=3)])
    assert main(["compare", str(first), str(second)]) == 2
    error = capsys.readouterr().err
    assert "has 1 x 9" in error
    assert "has not seen; --step N compares step N of both" in error
    assert main(["compare", str(first), str(second), "--step", "3"]) == 0
    assert "batch 1 x 9, batch not seen" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", str(first), str(second), "--step", "4"]) == 2
    assert "no rank in common that knows the peak of step 4" in capsys.readouterr().err
    assert main(["compare", str(step_log_path(first, 1)), str(first), "--fail-above", "much"]) == 2
    assert main(["compare", str(step_log_path(first, 1)), str(first), "--fail-above", "x%"]) == 2
    assert "--fail-above must be a size or a percentage" in capsys.readouterr().err


def test_a_plan_has_a_threshold_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measured peak above the planned one."""
    entry = {"category": "weights", "component": "trainable", "dtype": "bfloat16", "bytes": 18 * GIB}
    plan = {
        "schema": "memtrace.plan/1", "recipe": "fp32", "assumptions": [], "total_bytes": 18 * GIB, "verdict": None,
        "moments": {"peak": {"allocated_bytes": 18 * GIB, "entries": [entry]}}, "reserved_bytes": None,
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run = write(tmp_path / "a", [traced_step()])
    assert main(["compare", str(tmp_path / "plan.json"), str(run), "--fail-above", "512MiB"]) == 1
    assert main(["compare", str(tmp_path / "plan.json"), str(run), "--fail-above", "513MiB"]) == 0
    assert "GiB" in capsys.readouterr().out

"""`memtrace compare`: planned, measured, difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from records import PEAK_ENTRIES, traced_step

from memtrace.cli import main
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.record.categories import Category

PLAN = {
    "schema": "memtrace.plan/1",
    "recipe": "bf16-master",
    "assumptions": [],
    "total_bytes": 2**31,
    "moments": {
        "peak": {
            "allocated_bytes": 2**31,
            "entries": [{"category": "weights", "component": "trainable", "dtype": "bfloat16", "bytes": 2**31}],
        }
    },
    "reserved_bytes": 2**32,
    "verdict": None,
}


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Arguments that compare a plan with a log of one traced step."""
    with StepLog(step_log_path(tmp_path, 1)) as log:
        log.write(traced_step())
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return ["compare", str(tmp_path / "plan.json"), str(tmp_path)]


def test_the_table_has_planned_measured_and_difference(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A category that was planned right differs by 0 B, one that was not planned by all of it."""
    assert main(run) == 0
    words = [line.replace("■", "").split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: " ".join(row[1:]) for row in words if row}
    assert rows["weights"] == "2.00 GiB 2.00 GiB 0 B +0.0%"
    assert rows["activations"] == "0 B 3.00 GiB +3.00 GiB +100.0%"
    assert rows["total"] == "2.00 GiB 18.50 GiB +16.50 GiB +89.2%"
    assert rows["reserved"] == "by the allocator: 4.00 GiB planned, 20.00 GiB measured"


def test_json_has_the_same_figures(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each category with planned, measured and difference in bytes; the total last."""
    assert main([*run, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["moments"]["peak"]
    by_name = {row["category"]: row for row in rows}
    assert by_name["weights"]["difference_bytes"] == 0
    assert by_name[Category.ACTIVATIONS]["measured_bytes"] == 3 * 2**30
    assert rows[-1]["measured_bytes"] == sum(PEAK_ENTRIES.values())


def test_a_rank_without_a_log_is_said(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks that there are are named."""
    assert main([*run, "--rank", "5"]) == 2
    assert "has no log of rank 5, only of 1" in capsys.readouterr().err


def test_what_is_no_plan_is_said(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A step log in place of the plan is named, and what was expected."""
    Path(run[1]).write_text("{}")
    assert main(run) == 2
    assert "plan.json" in capsys.readouterr().err

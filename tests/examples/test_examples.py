"""The examples, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SHORT = ("--max-steps", "3", "--batch-size", "4", "--max-tokens", "16", "--held-out", "100")

HELD_OUT = re.compile(r"accuracy on held-out docstrings, 16 classes: \d+\.\d% before, \d+\.\d% after")


def run_example(script: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *SHORT, *options],
        cwd=cwd,
        env={**os.environ, "KINETO_LOG_LEVEL": "6"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def categories_at(record: dict[str, Any], moment: str) -> set[str]:
    return {entry["category"] for entry in record["moments"][moment]["entries"]}


def test_trainer_example_logs_every_step_and_shows_the_table(tmp_path: Path) -> None:
    """The Trainer example trains the real checkpoint, says where its metrics are, and leaves a record of each step."""
    done = run_example("finetune_trainer.py", "--output-dir", "out", cwd=tmp_path)
    assert HELD_OUT.search(done.stdout)
    assert re.search(r"http://127\.0\.0\.1:\d+/metrics", done.stderr)
    records = read_log(tmp_path / "out" / "memtrace" / "steps-rank0.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    traced = [record for record in records if record["traced"]]
    assert traced
    assert {"weights", "optimizer_state", "activations"} <= categories_at(traced[-1], "forward_end")
    assert "gradients" in categories_at(traced[-1], "backward_end")
    assert "optimizer_state" in done.stderr


@pytest.fixture(scope="module")
def loop_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the plain loop prints with memtrace, and what memtrace says."""
    done = run_example("finetune_loop.py", cwd=tmp_path_factory.mktemp("loop"))
    return done.stdout + done.stderr


@pytest.mark.long
def test_loop_example_shows_master_weights_and_the_other_four(loop_output: str) -> None:
    """The plain loop prints a table with all five categories that its recipe has."""
    for category in ("weights", "master_weights", "gradients", "optimizer_state", "activations"):
        assert re.search(rf"\b{category}\b", loop_output), category


@pytest.mark.long
def test_memtrace_can_be_left_out_and_changes_no_result(loop_output: str, tmp_path: Path) -> None:
    """With `--no-memtrace` the loop reaches the same accuracies, prints no table and leaves no log."""
    done = run_example("finetune_loop.py", "--no-memtrace", cwd=tmp_path)
    without = done.stdout + done.stderr
    accuracies = HELD_OUT.search(loop_output)
    assert accuracies
    assert accuracies[0] in without
    assert "master_weights" not in without
    assert not list(tmp_path.iterdir())

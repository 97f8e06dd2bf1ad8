"""The example with DeepSpeed, run as a user runs it, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from entries import total

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("deepspeed-example")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_deepspeed.py"
OPTIONS = ("--max-steps", "3", "--max-tokens", "16")
RANKS = 2

WITHOUT_COMPILING = """
import runpy, sys, deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Gloo alone: DeepSpeed's own collectives for a CPU would be compiled first, for a minute."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    directory = tmp_path_factory.mktemp("example")
    (directory / "run.py").write_text(WITHOUT_COMPILING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*launcher, "run.py", EXAMPLE, *OPTIONS, "--log-dir", directory / "log"],
        cwd=directory,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done, directory / "log"


def peak_of(log: Path, rank: int) -> dict[str, Any]:
    """Returns the peak of the last traced step in the form that `entries` reads."""
    records = [json.loads(line) for line in (log / f"steps-rank{rank}.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    peak = [record for record in records if record["traced"]][-1]["moments"]["peak"]
    rows = [[entry["category"], entry["component"], entry["dtype"], entry["bytes"]] for entry in peak["entries"]]
    return {"entries": rows, "allocated_bytes": peak["allocated_bytes"]}


def test_each_rank_logs_every_step(run):
    """One log a rank, three optimizer steps each although there are four micro batches in one; law 1 at the peak."""
    for rank in range(RANKS):
        peak = peak_of(run[1], rank)
        assert sum(size for *_, size in peak["entries"]) == peak["allocated_bytes"]


def test_the_proportions_are_those_of_zero_2(run):
    """Whole bf16 weights; masters and each moment in fp32 for half of them."""
    for rank in range(RANKS):
        peak = peak_of(run[1], rank)
        weights = total(peak, "weights", "trainable", "bfloat16")
        assert weights > 2 * 22_000_000
        assert total(peak, "master_weights") == weights
        assert total(peak, "optimizer_state", "exp_avg") == weights
        assert total(peak, "optimizer_state", "exp_avg_sq") == weights


def test_it_says_where_to_look(run):
    """The last line names the command that shows the ranks."""
    assert f"memtrace show {run[1]}" in run[0].stdout

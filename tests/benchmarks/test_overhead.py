"""The harness of `make bench` and `make bench-gpu`, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.overhead import measure
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Training, Workload, bf16_llama

ROOT = Path(__file__).parents[2]


def small(device: torch.device) -> Training:
    """The model of `make bench-gpu` in small."""
    return bf16_llama(device, layers=1, width=64, vocabulary=100, tokens=(1, 8))


def test_every_variant_is_measured_beside_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round gives each of them a ratio; the step after the warm-up is traced where all are."""
    monkeypatch.chdir(tmp_path)
    workload = Workload(name="small", title="Llama in small", build=small, block=1, warm_up=3)
    rows = {v.name: measure(workload, v, device=torch.device("cpu"), seconds=0) for v in VARIANTS}
    assert all(row["ratio"] > 0 and row["rounds"] == row["steps"] == 1 for row in rows.values())
    assert rows["every_step"]["traced_steps"] == 1
    assert rows["control"]["traced_steps"] == 0


def test_the_command_measures_each_variant_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It prints a row for each and writes what it prints, with what it was measured on."""
    command = [sys.executable, "-m", "benchmarks.overhead", "tiny", "--seconds", "0", "--variants", "control,default"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: so few steps may miss the bound
    found = json.loads((tmp_path / "cpu-overhead-tiny.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in found["ratios"]] == ["control", "default"]
    assert all(f"  {row['variant']} " in done.stdout for row in found["ratios"])
    assert found["environment"]["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: nothing is refused")
def test_without_a_device_the_gpu_benchmark_refuses() -> None:
    """With a sentence, before anything is built."""
    command = [sys.executable, "-m", "benchmarks.overhead", "llama1b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "llama1b needs a CUDA device, and torch sees none here" in done.stderr

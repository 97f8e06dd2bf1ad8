"""The harness of `make bench` and `make bench-gpu`, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead import measure
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Training, Workload, bf16_llama

ROOT = Path(__file__).parents[2]


def small(device: torch.device) -> Training:
    """The model of `make bench-gpu` in small."""
    return bf16_llama(device, layers=1, width=64, vocabulary=100, tokens=(1, 8))


def measured() -> dict[str, Any]:
    return {
        "title": "nothing again",
        "ratio": 1.0,
        "interval": (0.99, 1.01),
        "quartiles": (0.99, 1.01),
        "untraced": 1.0,
        "traced": None,
        "total": 1.0,
        "rounds": 4,
        "steps": 4,
        "traced_steps": 0,
        "step_seconds": 0.1,
        "bound": None,
    }


def test_every_variant_is_measured_beside_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round gives each of them a ratio; the step after the warm-up is traced where all are."""
    monkeypatch.chdir(tmp_path)
    workload = Workload(name="small", title="Llama in small", build=small, block=1, warm_up=3)
    rows = {v.name: measure(workload, v, device=torch.device("cpu"), seconds=0) for v in VARIANTS}
    assert all(row["ratio"] > 0 and row["rounds"] == row["steps"] == 1 for row in rows.values())
    assert rows["every_step"]["traced_steps"] == 1
    assert rows["control"]["traced_steps"] == 0


@pytest.mark.long
def test_the_command_measures_each_variant_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It prints a row for each and writes what it prints, with what it was measured on."""
    command = [sys.executable, "-m", "benchmarks.overhead", "tiny", "--seconds", "0", "--variants", "control,default"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: so few steps may miss the bound
    found = json.loads((tmp_path / "cpu-overhead-tiny.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in found["ratios"]] == ["control", "default"]
    assert all(f"  {row['variant']} " in done.stdout for row in found["ratios"])
    assert found["environment"]["threads"] == 1


def test_a_row_is_written_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second of three variants begins, the file has the first; one that fails leaves the others' rows."""
    seen: list[list[str]] = []
    row = {**measured(), "variant": "control"}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        name = command[command.index("--variants") + 1]
        path = tmp_path / "cpu-overhead-tiny-short.json"
        seen.append([found["variant"] for found in json.loads(path.read_text())["ratios"]] if path.exists() else [])
        failed = name == "default"
        return subprocess.CompletedProcess(command, int(failed), json.dumps([{**row, "variant": name}]).encode())

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["overhead", "tiny", "--short", "--results", str(tmp_path)])
    assert overhead.main() == 1
    assert seen == [[], ["control"], ["control"]]
    found = json.loads((tmp_path / "cpu-overhead-tiny-short.json").read_text())
    assert [row["variant"] for row in found["ratios"]] == ["control", "every_step"]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.99, 1.004), "kept"), ((1.001, 1.009), "cannot be told"), ((1.006, 1.02), "NOT KEPT")],
)
def test_a_bound_is_held_against_the_interval(interval: tuple[float, float], expected: str) -> None:
    """What a run cannot tell, it does not say."""
    assert overhead.verdict({"bound": 1.005, "interval": interval}) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: nothing is refused")
def test_without_a_device_the_gpu_benchmark_refuses() -> None:
    """With a sentence, before anything is built."""
    command = [sys.executable, "-m", "benchmarks.overhead", "llama1b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "llama1b needs a CUDA device, and torch sees none here" in done.stderr

"""Scripts that know nothing of memtrace, under `memtrace run`: records, law 1, the same weights, the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "0"]
RUN = ["-m", "memtrace", "run", "--port", "0", "--trace-every", "1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a process has ended, and what it has left."""

    status: int
    weights: str
    err: str
    logs: Mapping[str, list[dict[str, Any]]]
    """The records of each rank, by the name of the log."""


def ran(words: Sequence[str], directory: Path) -> End:
    directory.mkdir()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate(timeout=240)
    weights = [line for line in out.splitlines() if line.rpartition("weights ")[2].isalnum()]
    logs = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(directory.rglob("steps-rank*.jsonl"))
        if "_memtrace" not in path.parts
    }
    return End(status=process.returncode, weights=weights[-1] if weights else "", err=err, logs=logs)


def assert_traced(end: End, steps: Mapping[str, int]) -> None:
    """Each rank has as many records as it should, and law 1 holds in each that is traced."""
    assert {name: len(found) for name, found in end.logs.items()} == steps, end.err
    for found in end.logs.values():
        assert sum(record["traced"] for record in found) >= 2
        for record in found:
            for moment in record["moments"].values() if record["traced"] else ():
                assert sum(entry["bytes"] for entry in moment["entries"]) == moment["allocated_bytes"]
        categories = {entry["category"] for entry in found[-1]["moments"]["step_end"]["entries"]}
        assert {"weights", "optimizer_state"} <= categories


def compared(
    script: str, *arguments: str, steps: Mapping[str, int], directory: Path, launcher: Sequence[str] = ()
) -> None:
    path = str(SCRIPTS / script)
    bare = ran([*launcher, path, *arguments], directory / "bare")
    traced = ran([*launcher, *RUN, path, *arguments], directory / "traced")
    assert (bare.status, traced.status) == (0, 0), bare.err + traced.err
    assert bare.weights == traced.weights != ""
    assert bare.logs == {}
    assert_traced(traced, steps)


@pytest.mark.parametrize(
    ("how", "status"),
    [("status", 3), ("signal", -signal.SIGTERM), pytest.param("exception", 1, marks=pytest.mark.long)],
)
def test_a_plain_loop(how: str, status: int, tmp_path: Path, bare_loop: End) -> None:
    """It trains to the same bits and ends in the same way, and its log is whole."""
    end = ran([*RUN, str(SCRIPTS / "unchanged_loop.py"), how], tmp_path / "traced")
    assert (end.status, end.weights) == (status, bare_loop.weights)
    assert_traced(end, {"steps-rank0.jsonl": 5})
    assert ("ValueError: bad data" in end.err) is (how == "exception")
    (run_file,) = tmp_path.rglob("run-rank0.json")
    assert json.loads(run_file.read_text())["state"] == {"signal": "signal"}.get(how, "exception")


@pytest.fixture(scope="module")
def bare_loop(tmp_path_factory: pytest.TempPathFactory) -> End:
    """The loop without memtrace."""
    return ran([str(SCRIPTS / "unchanged_loop.py")], tmp_path_factory.mktemp("loop") / "bare")


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "arguments", "steps"),
    [
        ("unchanged_trainer.py", [], 6),
        ("unchanged_accelerate.py", [], 6),
        ("unchanged_lightning.py", ["lightning.pytorch"], 6),
        ("unchanged_lightning.py", ["pytorch_lightning"], 6),
    ],
)
def test_a_framework(script: str, arguments: list[str], steps: int, tmp_path: Path) -> None:
    """Each trains to the same bits."""
    compared(script, *arguments, steps={"steps-rank0.jsonl": steps}, directory=tmp_path)


@pytest.mark.long
def test_under_accelerate_launch(tmp_path: Path) -> None:
    """The launcher starts the module of memtrace, which starts the script."""
    launcher = [*ACCELERATE, "--mixed_precision", "no", "--dynamo_backend", "no"]
    compared("unchanged_accelerate.py", steps={"steps-rank0.jsonl": 6}, directory=tmp_path, launcher=launcher)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_deepspeed_on_two_ranks(launcher: str, tmp_path: Path) -> None:
    """Each rank has a log; both launchers end well, and with the same weights."""
    words = TORCHRUN if launcher == "torchrun" else DEEPSPEED
    path = str(SCRIPTS / "unchanged_deepspeed.py")
    bare = ran([*TORCHRUN, path], tmp_path / "bare")
    traced = ran([*words, *(["--module", *RUN[1:]] if launcher == "deepspeed" else RUN), path], tmp_path / "traced")
    assert (bare.status, traced.status) == (0, 0), bare.err + traced.err
    assert bare.weights == traced.weights != ""
    assert_traced(traced, {"steps-rank0.jsonl": 5, "steps-rank1.jsonl": 5})


@pytest.mark.long
def test_torchrun_sees_how_a_rank_ends(tmp_path: Path) -> None:
    """The status of the script is that of the rank."""
    end = ran([*TORCHRUN, *RUN, str(SCRIPTS / "unchanged_loop.py"), "status"], tmp_path / "traced")
    assert end.status == 1
    assert "(exitcode: 3)" in end.err

"""Scripts that know nothing of memtrace, under `memtrace run`: records, law 1, the same weights, the same end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
RUN = ["-m", "memtrace", "run", "--port", "0", "--trace-every", "1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a process has ended, and what it has left."""

    status: int
    seen: Sequence[str]
    """What it tells of its weights: in its fifth step, and at its end."""
    err: str
    logs: Mapping[str, list[dict[str, Any]]]
    """The records of each rank, by the name of the log."""
    states: Sequence[str]
    """How each rank's run has ended, by its run file."""


def ran(words: Sequence[str], directory: Path, **variables: str) -> End:
    directory.mkdir()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate()
    weights = [line for line in out.splitlines() if line.rpartition("weights ")[2].isalnum()]
    logs = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(directory.rglob("steps-rank*.jsonl"))  # links are not followed: each is found once
    }
    files = sorted(directory.rglob("run-rank*.json"))
    states = [json.loads(path.read_text(encoding="utf-8"))["state"] for path in files]
    return End(status=process.returncode, seen=weights, err=err, logs=logs, states=states)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


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


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., End]:
    """Runs a script without memtrace, once for all tests that compare with it."""

    @cache
    def run(*words: str) -> End:
        end = ran(words, tmp_path_factory.mktemp("bare") / "run")
        assert end.logs == {}
        return end

    return run


def assert_same(found: End, expected: End) -> None:
    assert (found.status, expected.status) == (0, 0), expected.err + found.err
    assert found.seen == expected.seen
    assert len(found.seen) >= 2


ENDS = {"status": 3, "signal": -signal.SIGTERM, "exception": 1}
GRACEFUL = ("lightning", "signal")
"""Lightning hears SIGTERM itself, ends the training after that step and exits with 0, without memtrace too."""
FINISHED = {"loop": 3, "trainer": 4, "accelerate": 3, "lightning": 4}
"""Steps with a record before the fifth: a plain loop's first one is not known as such before it ends."""


@pytest.mark.xdist_group("unchanged")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if name == "loop" and how != "exception" else pytest.mark.long)
        for name in FINISHED
        for how in ENDS
    ],
)
def test_it_ends_within_the_training_as_without(name: str, how: str, tmp_path: Path, bare: Callable[..., End]) -> None:
    """By `sys.exit(3)`, SIGTERM or an exception in the fifth step: the same bits till then, and a whole log."""
    words = [str(SCRIPTS / f"unchanged_{name}.py"), *(["lightning.pytorch"] if name == "lightning" else [])]
    end = ran([*RUN, *words], tmp_path / "traced", END=how)
    graceful = (name, how) == GRACEFUL
    assert end.status == (0 if graceful else ENDS[how]), end.err
    assert list(end.seen) == list(bare(*words).seen[:1])
    assert_traced(end, {"steps-rank0.jsonl": FINISHED[name] + graceful})
    assert ("ValueError: bad data" in end.err) is (how == "exception")
    assert end.states == ["ok" if graceful else {"signal": "signal"}.get(how, "exception")]


@pytest.mark.long
@pytest.mark.xdist_group("unchanged")
@pytest.mark.parametrize("name", ["trainer", "accelerate", "lightning.pytorch", "pytorch_lightning"])
def test_a_framework(name: str, tmp_path: Path, bare: Callable[..., End]) -> None:
    """Each trains to the same bits, with a record of each step."""
    if "lightning" in name:
        script = str(SCRIPTS / "unchanged_lightning.py")
        words, reference = [script, name], bare(script, "lightning.pytorch")
    else:
        words = [str(SCRIPTS / f"unchanged_{name}.py")]
        reference = bare(*words)
    end = ran([*RUN, *words], tmp_path / "traced")
    assert_same(end, reference)
    assert_traced(end, {"steps-rank0.jsonl": 6})


@pytest.mark.long
@pytest.mark.xdist_group("unchanged")
def test_under_accelerate_launch(tmp_path: Path, bare: Callable[..., End]) -> None:
    """The launcher starts the module of memtrace, which starts the script."""
    script = str(SCRIPTS / "unchanged_accelerate.py")
    end = ran([*ACCELERATE, *RUN, script], tmp_path / "traced")
    assert_same(end, bare(script))
    assert_traced(end, {"steps-rank0.jsonl": 6})


@pytest.mark.long
@pytest.mark.xdist_group("unchanged")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_deepspeed_on_two_ranks(launcher: str, tmp_path: Path, bare: Callable[..., End]) -> None:
    """Each rank has a log; both launchers end well, and with the same weights."""
    script = str(SCRIPTS / "unchanged_deepspeed.py")
    words = [*TORCHRUN, *RUN] if launcher == "torchrun" else [*DEEPSPEED, free_port(), "--module", *RUN[1:]]
    end = ran([*words, script], tmp_path / "traced")
    assert_same(end, bare(*TORCHRUN, script))
    assert_traced(end, {"steps-rank0.jsonl": 5, "steps-rank1.jsonl": 5})


@pytest.mark.long
@pytest.mark.xdist_group("unchanged")
def test_torchrun_sees_how_a_rank_ends(tmp_path: Path) -> None:
    """The status of the script is that of the rank."""
    end = ran([*TORCHRUN, *RUN, str(SCRIPTS / "unchanged_loop.py")], tmp_path / "traced", END="status")
    assert end.status == 1
    assert "(exitcode: 3)" in end.err


@pytest.mark.long
@pytest.mark.xdist_group("unchanged")
@pytest.mark.parametrize("how", ["status", "exception"])
def test_a_rank_of_deepspeed_ends_within_the_training(how: str, tmp_path: Path, bare: Callable[..., End]) -> None:
    """torchrun sees how rank 0 ends, and ends the other by SIGTERM; the logs of both are whole."""
    script = str(SCRIPTS / "unchanged_deepspeed.py")
    end = ran([*TORCHRUN, *RUN, script], tmp_path / "traced", END=how)
    assert end.status == 1
    assert f"(exitcode: {ENDS[how]})" in end.err
    assert ("ValueError: bad data" in end.err) is (how == "exception")
    assert list(end.seen) == list(bare(*TORCHRUN, script).seen[:1])
    assert_traced(end, {"steps-rank0.jsonl": 3, "steps-rank1.jsonl": 3})
    assert end.states == ["exception", "signal"]

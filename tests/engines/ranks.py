"""The processes of a run that tests talk to while it goes on: started one by one, so that one of them can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "workers" / "trainer.py"
RANKS = 2
STEPS = 4
PATIENCE_SECONDS = 120


class Ranks:
    """The ranks of a run with Trainer, which trains with one engine after the other; each waits at a step.

    Args:
        engines: what to train with, as the worker calls it.
        directory: for everything that the run writes.
        hold_at: the step at whose end each engine waits until `go_on()`.
    """

    def __init__(self, engines: list[str], directory: Path, *, hold_at: int = STEPS) -> None:
        self.port = free_port()
        self._directory = directory
        self._scraped, self._reports = directory / "scraped", directory / "reports"
        for made in (self._scraped, self._reports):
            made.mkdir(exist_ok=True)
        for old in self._scraped.iterdir():
            old.unlink()
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "HOLD_AT": str(hold_at),
            "KINETO_LOG_LEVEL": "6",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PORT": str(self.port),
            "REPORT_DIR": str(self._reports),
            "RUN_DIR": str(directory / "run"),
            "SCRAPED": str(self._scraped),
            "WORLD_SIZE": str(RANKS),
        }
        self._processes = []
        for rank in range(RANKS):
            with self._output(rank).open("wb") as output:
                command = [sys.executable, WORKER, *engines]
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(command, env={**environment, **own}, stdout=output, stderr=output)
            self._processes.append(process)

    def log_dir(self, engine: str) -> Path:
        """Where memtrace writes by default: in Trainer's output directory."""
        return self._directory / "run" / engine / "memtrace"

    def target(self, engine: str, rank: int) -> Path:
        return self.log_dir(engine) / f"target-rank{rank}.json"

    def records(self, engine: str, rank: int) -> list[dict[str, Any]]:
        path = self.log_dir(engine) / f"steps-rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def holds(self, engine: str, step: int = STEPS, *, already: int = 0) -> bool:
        """Whether every rank has logged this step and can be found; `already` lines are from an earlier run."""
        logs = [self.records(engine, rank)[already:] for rank in range(RANKS)]
        found = all(self.target(engine, rank).exists() for rank in range(RANKS))
        return found and all(records and records[-1]["step"] == step for records in logs)

    def wait(self, reached: Callable[[], bool]) -> None:
        """Returns when `reached()` is true; fails the test when a rank ends before that, unless it was killed."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            for rank, process in enumerate(self._processes):
                if process.poll() not in (None, -signal.SIGKILL) or time.monotonic() > end:
                    pytest.fail(self._output(rank).read_text()[-6000:])
            time.sleep(0.05)

    def go_on(self, engine: str) -> None:
        """Lets the step that waits end."""
        (self._scraped / engine).touch()

    def kill(self, rank: int) -> None:
        self._processes[rank].kill()
        self._processes[rank].wait()

    def ended(self, rank: int) -> int:
        """Returns the exit status of a rank, once it has ended by itself."""
        return self._processes[rank].wait(PATIENCE_SECONDS)

    def finish(self) -> list[dict[str, Any]]:
        """Returns the report of each rank when all have ended well."""
        for rank in range(RANKS):
            assert self.ended(rank) == 0, self._output(rank).read_text()[-6000:]
        return [json.loads((self._reports / f"rank{rank}.json").read_text()) for rank in range(RANKS)]

    def stop(self) -> None:
        for rank in range(RANKS):
            self.kill(rank)

    def _output(self, rank: int) -> Path:
        return self._directory / f"output-rank{rank}.txt"


@contextmanager
def running(engines: list[str], directory: Path, *, hold_at: int = STEPS) -> Iterator[Ranks]:
    """Starts the ranks, and ends those that are left."""
    ranks = Ranks(engines, directory, hold_at=hold_at)
    try:
        yield ranks
    finally:
        ranks.stop()


def free_port() -> int:
    """Returns a port on loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def address(target: Path) -> str:
    """Returns host and port in a target file."""
    (group,) = json.loads(target.read_text())
    (found,) = group["targets"]
    return str(found)


def scrape(target: Path) -> str:
    """Returns what the endpoint in a target file serves."""
    with urllib.request.urlopen(f"http://{address(target)}/metrics", timeout=30) as answer:
        return str(answer.read().decode())

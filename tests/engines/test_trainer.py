"""Trainer on two ranks with nothing but the callback added: logs, target files, and a Prometheus that finds both."""

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
from prometheus_server import PrometheusServer

WORKER = Path(__file__).parent / "workers" / "trainer.py"
RANKS = 2
STEPS = 4
PATIENCE_SECONDS = 120


class Ranks:
    """The processes of one run, started one by one so that one of them can be killed."""

    def __init__(self, engine: str, directory: Path, port: int) -> None:
        self.run_dir = directory / "run"
        self.scraped = directory / "scraped"
        self._reports = directory / "reports"
        self._reports.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "KINETO_LOG_LEVEL": "6",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PORT": str(port),
            "REPORT_DIR": str(self._reports),
            "RUN_DIR": str(self.run_dir),
            "SCRAPED": str(self.scraped),
            "WORLD_SIZE": str(RANKS),
        }
        self._processes = []
        for rank in range(RANKS):
            with (directory / f"output-rank{rank}.txt").open("wb") as output:
                command = [sys.executable, WORKER, engine]
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(command, env={**environment, **own}, stdout=output, stderr=output)
            self._processes.append(process)
        self._directory = directory

    def wait(self, reached: Callable[[], bool]) -> None:
        """Returns when `reached()` is true; fails the test when a rank ends before that."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            for rank, process in enumerate(self._processes):
                if process.poll() not in (None, -signal.SIGKILL) or time.monotonic() > end:
                    pytest.fail((self._directory / f"output-rank{rank}.txt").read_text()[-6000:])
            time.sleep(0.05)

    def kill(self, rank: int) -> None:
        self._processes[rank].kill()
        self._processes[rank].wait()

    def finish(self) -> list[dict[str, Any]]:
        """Lets the last step go on, and returns the report of each rank when all have ended."""
        self.scraped.touch()
        for rank, process in enumerate(self._processes):
            assert process.wait(PATIENCE_SECONDS) == 0, (self._directory / f"output-rank{rank}.txt").read_text()
        return [json.loads((self._reports / f"rank{rank}.json").read_text()) for rank in range(RANKS)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def target(self, rank: int) -> Path:
        return self.run_dir / "memtrace" / f"target-rank{rank}.json"

    def records(self, rank: int) -> list[dict[str, Any]]:
        path = self.run_dir / "memtrace" / f"steps-rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def at_last_step(self) -> bool:
        return all(records and records[-1]["step"] == STEPS for records in map(self.records, range(RANKS)))


@contextmanager
def running(engine: str, directory: Path, port: int) -> Iterator[Ranks]:
    ranks = Ranks(engine, directory, port)
    try:
        yield ranks
    finally:
        ranks.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(target: Path) -> str:
    (group,) = json.loads(target.read_text())
    with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def zero_2(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A run with DeepSpeed ZeRO-2, with what Prometheus said while it stood at its last step."""
    directory = tmp_path_factory.mktemp("zero-2")
    port = free_port()
    with running("deepspeed", directory, port) as ranks:
        ranks.wait(ranks.at_last_step)
        ranks.wait(lambda: all(ranks.target(rank).exists() for rank in range(RANKS)))
        ports = [json.loads(ranks.target(rank).read_text())[0]["targets"][0] for rank in range(RANKS)]
        (directory / "prometheus").mkdir()
        job = {
            "job_name": "training",
            "file_sd_configs": [{"files": [str(ranks.target(0).with_name("target-*.json"))]}],
        }
        with PrometheusServer(directory / "prometheus", [job]) as prometheus:
            prometheus.wait_for(f"count(memtrace_steps_total == {STEPS}) == {RANKS}")
            peaks = prometheus.query('memtrace_memory_bytes{moment="peak"}')
        reports = ranks.finish()
        yield {"ranks": ranks, "reports": reports, "peaks": peaks, "first_port": port, "targets": ports}


def test_losses_and_weights_are_the_same(zero_2):
    """The run with the callback has the bits of the run without it, on every rank."""
    for report in zero_2["reports"]:
        assert report["watched"] == report["plain"]


def test_prometheus_says_what_each_log_says(zero_2):
    """Found through their target files, the ranks' categories at the peak are those of the last traced step."""
    for rank in range(RANKS):
        traced = [record for record in zero_2["ranks"].records(rank) if record["traced"]][-1]
        logged: dict[tuple[str, str, str], int] = {}
        for entry in traced["moments"]["peak"]["entries"]:
            logged[entry["category"], entry["component"], entry["dtype"]] = entry["bytes"]
        scraped = {
            (
                sample.labels["category"],
                sample.labels.get("component", ""),
                sample.labels.get("dtype", ""),
            ): sample.value
            for sample in zero_2["peaks"]
            if sample.labels["rank"] == str(rank)
        }
        assert {key: size for key, size in scraped.items() if size} == logged
        assert sum(logged.values()) == traced["moments"]["peak"]["allocated_bytes"]


def test_ports_count_up_with_the_local_rank(zero_2):
    """The second rank has a later port than the first: the next one, unless somebody else had it."""
    first, second = (int(target.rsplit(":", 1)[1]) for target in zero_2["targets"])
    assert zero_2["first_port"] <= first < second


def test_target_files_go_with_a_clean_end(zero_2):
    """Nothing is left to be scraped."""
    assert not any(zero_2["ranks"].target(rank).exists() for rank in range(RANKS))


def test_a_killed_rank_leaves_the_others_right(tmp_path):
    """Metrics, log and target file of the survivor stay; a restart takes over the dead rank's files."""
    with running("ddp", tmp_path, free_port()) as ranks:
        ranks.wait(ranks.at_last_step)
        ranks.kill(1)
        assert f'memtrace_steps_total{{rank="0"}} {STEPS}.0' in scrape(ranks.target(0))
        assert [record["step"] for record in ranks.records(0)] == list(range(1, STEPS + 1))
        assert [record["step"] for record in ranks.records(1)] == list(range(1, STEPS + 1))
        stale = ranks.target(1).read_text()
    with running("ddp", tmp_path, free_port()) as ranks:
        ranks.wait(lambda: ranks.target(1).read_text() != stale)
        ranks.finish()
        assert not any(ranks.target(rank).exists() for rank in range(RANKS))
        assert {record["rank"] for record in ranks.records(1)} == {1}

"""From a real Trainer through a real Prometheus and a real Alertmanager to a webhook, with what is shipped.

The shipped rules and the shipped routing are used as they are, but with every duration divided by 60, so that five
minutes take five seconds. Thresholds stay.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from promql import ROOT, RULES
from servers import Webhook, alertmanager, ask, free_port, prometheus

from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.categories import Moment

JOB = Path(__file__).with_name("training_job.py")
ALERTMANAGER = ROOT / "integrations" / "alertmanager" / "alertmanager.yml"
UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}
rule_files: [{rules}]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: training
    file_sd_configs: [{{files: ["{directory}/memtrace/target-rank*.json"], refresh_interval: 250ms}}]
"""


def faster(text: str) -> str:
    """Returns a configuration with every duration divided by 60."""

    def divided(match: re.Match[str]) -> str:
        return f"{int(match[1]) * UNITS[match[2]] // 60}ms"

    return re.sub(r"(?<=[\[ :])(\d+)(ms|s|m|h|d)(?=[\]):\s]|$)", divided, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    process: subprocess.Popen[bytes]
    directory: Path
    webhook: Webhook
    prometheus: str

    def wait_until_it_waits(self) -> None:
        deadline = time.monotonic() + 180
        while not (self.directory / "waiting").exists():
            assert self.process.poll() is None, (self.directory / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the job does not come to where it waits"
            time.sleep(0.1)

    def go_on(self) -> None:
        (self.directory / "go").touch()

    def log(self) -> str:
        return (self.directory / "log").read_text()


@contextmanager
def job(scenario: str, directory: Path) -> Iterator[Job]:
    """Runs a scenario under the watch of Prometheus and Alertmanager."""
    port = free_port()
    rules = directory / "memtrace.rules.yml"
    rules.write_text(faster(RULES.read_text()))
    webhook = Webhook()
    routing = faster(ALERTMANAGER.read_text()).replace("http://127.0.0.1:9094", webhook.url)
    environment = os.environ | {"KINETO_LOG_LEVEL": "6", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(JOB), scenario, str(port), str(directory)]
    try:
        with alertmanager(directory, routing) as alerts:
            config = CONFIG.format(rules=rules, alertmanager=alerts.removeprefix("http://"), directory=directory)
            with (
                prometheus(directory, config) as url,
                (directory / "log").open("wb") as log,
                subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
            ):
                try:
                    yield Job(process=process, directory=directory, webhook=webhook, prometheus=url)
                finally:
                    process.kill()
    finally:
        webhook.close()


def test_a_batch_that_will_not_fit_is_told_before_it_comes(tmp_path: Path) -> None:
    """Lengths grow toward a limit: the alert arrives while the job still waits before the batch that exceeds it."""
    with job("growing", tmp_path) as running:
        running.wait_until_it_waits()
        alert = running.webhook.wait_for("MemtraceOomPredicted")
        assert alert["labels"]["run"] == "growing"
        assert alert["labels"]["severity"] == "warning"
        assert alert["path"] == "/training"
        peak = ask(running.prometheus, "query", query="memtrace_step_peak_bytes / memtrace_capacity_bytes")
        assert float(peak["result"][0]["value"][1]) < 0.9
        capacity = ask(running.prometheus, "query", query="memtrace_capacity_bytes")
        running.go_on()
        assert running.process.wait(120) == 0
        records = list(read_step_log(tmp_path / "memtrace" / "steps-rank0.jsonl"))
        peaks = [record.moments[Moment.PEAK].total_bytes for record in records]
        limit = float(capacity["result"][0]["value"][1])
        assert max(peaks[:-1]) < limit < peaks[-1], "the batch that was foretold is the one that exceeds"
        assert running.log().count("memory may run out at the longest batch") == 1


def test_a_leak_is_told(tmp_path: Path) -> None:
    """A list that keeps a tensor of every step: the alert comes with the category, to whoever is on call."""
    with job("leak", tmp_path) as running:
        running.wait_until_it_waits()
        alert = running.webhook.wait_for("MemtraceLimitSoon")
        assert alert["labels"]["run"] == "leak"
        assert alert["path"] == "/on-call"
        growth = ask(running.prometheus, "query", query="memtrace_growth_per_step_bytes")
        assert growth["result"][0]["metric"]["category"] == "unattributed"
        assert float(growth["result"][0]["value"][1]) == pytest.approx(1024 * 512 * 4, rel=0.05)


def test_a_healthy_run_is_silent(tmp_path: Path) -> None:
    """Forty steps with room to spare: every rule is evaluated on them, and nothing arrives, during it or after it.

    The run takes its target file away as it ends.
    """
    with job("healthy", tmp_path) as running:
        running.wait_until_it_waits()
        evaluated(running, times=20)
        risk = ask(running.prometheus, "query", query="rank:memtrace_oom_risk:ratio")
        assert float(risk["result"][0]["value"][1]) < 0.01
        running.go_on()
        assert running.process.wait(120) == 0
        evaluated(running, times=30)
        assert names(running) == []
        assert "memory may run out" not in running.log()


def names(running: Job) -> list[str]:
    return [alert["labels"]["alertname"] for alert in running.webhook.firing()]


def evaluated(running: Job, *, times: int) -> None:
    """Waits until the rules have been evaluated so many times from now on."""
    started = ask(running.prometheus, "rules")["groups"][0]["lastEvaluation"]
    seen = {started}
    deadline = time.monotonic() + 120
    while len(seen) <= times:
        assert time.monotonic() < deadline
        seen.add(ask(running.prometheus, "rules")["groups"][0]["lastEvaluation"])
        time.sleep(0.02)

"""How runs end, with static targets that stay: from real Trainers through Prometheus and Alertmanager to a webhook."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from promql import RULES
from servers import Webhook, alertmanager, ask, free_port, prometheus
from test_end_to_end import ALERTMANAGER, JOB, Job, evaluated, faster, names

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 100ms}}
rule_files: [{rules}]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: training
    static_configs: [{{targets: [{targets}]}}]
"""
OWN_THRESHOLDS = """\
      - {record: memtrace_threshold:headroom_low:ratio, expr: vector(-1), labels: {run: near-limit}}
      - {record: memtrace_threshold:oom_risk:ratio, expr: vector(2), labels: {run: near-limit}}
      - {record: memtrace_threshold:overhead:ratio, expr: vector(9), labels: {run: near-limit}}
      - {record: memtrace_threshold:overhead:ratio, expr: vector(9), labels: {run: out-of-memory}}
      - {record: memtrace_threshold:overhead:ratio, expr: vector(9), labels: {run: healthy}}
"""
"""One run is meant to be near its limit, and all of them trace short steps at a cost that is the machine's."""


def with_own_thresholds(rules: str) -> str:
    """Returns the rules with those thresholds before the others."""
    head, tail = rules.split("    rules:\n", 1)
    return f"{head}    rules:\n{OWN_THRESHOLDS}{tail}"


def test_each_end_is_told_as_what_it_is(tmp_path: Path) -> None:
    """Of an uncaught OOM, a SIGTERM and a normal end at more than 90 %, the first one is told, and nothing else is."""
    scenarios = ("out_of_memory", "healthy", "near_limit")
    ports = {scenario: free_port() for scenario in scenarios}
    rules = tmp_path / "memtrace.rules.yml"
    rules.write_text(with_own_thresholds(faster(RULES.read_text())))
    webhook = Webhook()
    routing = faster(ALERTMANAGER.read_text()).replace("http://127.0.0.1:9094", webhook.url)
    environment = os.environ | {"KINETO_LOG_LEVEL": "6", "OMP_NUM_THREADS": "1", "MEMTRACE_LINGER_SECONDS": "60"}
    jobs: dict[str, Job] = {}
    try:
        with alertmanager(tmp_path, routing) as alerts:
            targets = ", ".join(f'"127.0.0.1:{port}"' for port in ports.values())
            config = CONFIG.format(rules=rules, alertmanager=alerts.removeprefix("http://"), targets=targets)
            with prometheus(tmp_path, config) as url:
                for scenario in scenarios:
                    directory = tmp_path / scenario
                    directory.mkdir()
                    command = [sys.executable, str(JOB), scenario, str(ports[scenario]), str(directory)]
                    with (directory / "log").open("wb") as log:
                        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                    jobs[scenario] = Job(process=process, directory=directory, webhook=webhook, prometheus=url)
                for running in jobs.values():
                    running.wait_until_it_waits()
                evaluated(jobs["near_limit"], times=20)
                left = ask(url, "query", query='rank:memtrace_headroom:ratio{run="near-limit"}')
                assert float(left["result"][0]["value"][1]) < 0.1
                jobs["out_of_memory"].go_on()
                jobs["near_limit"].go_on()
                jobs["healthy"].process.send_signal(signal.SIGTERM)
                codes = {name: running.process.wait(120) for name, running in jobs.items()}
                assert codes == {"out_of_memory": 1, "healthy": -signal.SIGTERM, "near_limit": 0}
                assert webhook.wait_for("MemtraceOutOfMemory")["path"] == "/on-call"
                evaluated(jobs["near_limit"], times=100)  # more than the ten seconds that any of the alerts waits
                ended = ask(url, "query", query="rank:memtrace_ended:timestamp_seconds")["result"]
                states = {series["metric"]["run"]: series["metric"]["state"] for series in ended}
                assert states == {"out-of-memory": "out_of_memory", "healthy": "signal", "near-limit": "ok"}
                assert set(names(jobs["near_limit"])) == {"MemtraceOutOfMemory"}
    finally:
        for running in jobs.values():
            running.process.kill()
            running.process.wait()
        webhook.close()

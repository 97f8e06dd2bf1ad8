"""`memtrace watch`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from memtrace.cli import main
from memtrace.config import TracerConfig
from memtrace.exporters.endpoint.server import Endpoint, serve
from memtrace.exporters.prometheus import registry_of
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot, Totals
from memtrace.risk import RiskMonitor

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
runpy.run_module("memtrace", run_name="__main__")
"""


def snapshot(**changes: object) -> Snapshot:
    """Returns the state after the last step of a recorded run."""
    monitor = RiskMonitor()
    for record in read_step_log(RUNS / "bert-lora.jsonl"):
        risk = monitor.observe(record, headroom_bytes=10**9)
    made = Snapshot(
        identity=RunIdentity(run_name="chat"),
        totals=Totals(steps=48, traced_steps=48),
        latest=record,
        latest_traced=record,
        risk=risk,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def state() -> list[Snapshot]:
    """What the trainer serves: the last one in the list."""
    return [snapshot()]


@pytest.fixture
def url(state: list[Snapshot]) -> Iterator[str]:
    """The address of a real metrics server."""
    endpoint = Endpoint.of(TracerConfig(port=0), 0)
    assert endpoint is not None
    with serve(registry_of(lambda: state[-1]), endpoint) as server:
        yield server.url


def test_metrics_are_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From an address: the run, its risk, what its peak is made of, and its memory."""
    assert main(["watch", url, "--once"]) == 0
    shown = capsys.readouterr().out
    for words in ("chat · rank 0", "48 steps, 48 traced", "risk to run out of memory 0%", "activations", "capacity"):
        assert words in shown


def test_memtrace_that_is_off_is_told(url: str, state: list[Snapshot], capsys: pytest.CaptureFixture[str]) -> None:
    """After a fault inside memtrace there is nothing to show but that."""
    state.append(snapshot(up=False))
    assert main(["watch", url, "--once"]) == 0
    assert "memtrace has switched itself off" in capsys.readouterr().out


@pytest.mark.parametrize("state_at_end", [state for state in RunState if state is not RunState.RUNNING])
def test_how_the_run_has_ended_is_told(
    url: str, state: list[Snapshot], state_at_end: RunState, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that stays for a last look says it, and not that memtrace is off."""
    state.append(snapshot(state=state_at_end))
    assert main(["watch", url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert f"the run has {state_at_end.words}; figures are as of its end" in shown
    assert "switched itself off" not in shown


def test_a_run_that_has_just_begun_is_shown(
    url: str, state: list[Snapshot], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step there is no composition and no forecast."""
    state.append(Snapshot(identity=RunIdentity(run_name="new")))
    assert main(["watch", url, "--once"]) == 0
    assert "no forecast yet" in capsys.readouterr().out


def test_log_directory_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a directory: the table of the newest step."""
    (tmp_path / "steps-rank0.jsonl").write_text((RUNS / "bert-lora.jsonl").read_text())
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "step 48" in capsys.readouterr().out


def test_it_goes_on_until_it_is_interrupted(tmp_path: Path) -> None:
    """New steps appear while it runs, and Ctrl-C ends it without a traceback."""
    log = tmp_path / "steps-rank0.jsonl"
    lines = (RUNS / "bert-lora.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:10]))
    command = [sys.executable, "-c", INTERRUPTIBLE, "watch", str(tmp_path), "--interval", "0.1"]
    output = tmp_path / "screen"
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    with output.open("wb") as screen, subprocess.Popen(command, stdout=screen, stderr=screen, env=environment) as shown:
        try:
            _wait_for(output, "step 10")
            log.write_text("".join(lines))
            _wait_for(output, "step 48")
            shown.send_signal(signal.SIGINT)
            assert shown.wait(30) == 130
        finally:
            shown.kill()
    assert "Traceback" not in output.read_text()


class NotMemtrace(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"node_load1 0.5\n" if self.path == "/metrics" else b"{{")

    def log_message(self, *arguments: object) -> None:
        pass


def test_somebody_elses_metrics_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The address of another exporter is a mistake that is told."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NotMemtrace) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        try:
            assert main(["watch", f"http://127.0.0.1:{http.server_port}", "--once"]) == 2
        finally:
            http.shutdown()
            thread.join()
    assert "is this the address of a trainer with memtrace?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1"], "no metrics there"),
        (["ftp://127.0.0.1"], "must begin with http:// or https://"),
        (["no/such/directory"], "there is no such step log"),
        (["x", "--interval", "0"], "--interval must be 0.1..3600 seconds"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the user got wrong is one line and exit status 2."""
    assert main(["watch", *arguments]) == 2
    assert message in capsys.readouterr().err


def _wait_for(file: Path, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in file.read_text(errors="replace"):
        assert time.monotonic() < deadline, file.read_text(errors="replace")[-2000:]
        time.sleep(0.05)

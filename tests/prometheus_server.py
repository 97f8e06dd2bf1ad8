"""Pytest plugin: a real Prometheus on loopback.

def test_x(prometheus_factory):
    prometheus = prometheus_factory(scrape_configs=[{"job_name": "train", "static_configs": [{"targets": [...]}]}])
    samples = prometheus.wait_for('memtrace_up == 1')
    sums = {s.labels["category"]: s.value for s in prometheus.query("sum by (category) (memtrace_memory_bytes)")}
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import pytest

_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')
_POLL_SECONDS = 0.05

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of an instant vector."""

    labels: dict[str, str]
    value: float


class PrometheusServer:
    """A running Prometheus; a context manager that stops it.

    Args:
        directory: for its configuration, data and log; must exist and be empty.
        scrape_configs: as in prometheus.yml.
        rule_files: paths of rule files.
        settings: further sections of prometheus.yml, such as `alerting`.
        interval: of scrapes and of rule evaluation.
        arguments: further arguments of the command.
    """

    def __init__(
        self,
        directory: Path,
        scrape_configs: Sequence[dict[str, Any]],
        *,
        rule_files: Sequence[Path] = (),
        settings: dict[str, Any] | None = None,
        interval: str = "250ms",
        arguments: Sequence[str] = (),
    ) -> None:
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "scrape_configs": list(scrape_configs),
            "rule_files": [str(path) for path in rule_files],
        }
        config_file = directory / "prometheus.yml"
        config_file.write_text(json.dumps(config | (settings or {})), encoding="utf-8")  # JSON is YAML
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config_file}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                    "--web.enable-lifecycle",
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = ""

    def __enter__(self) -> Self:
        """Waits until it answers."""
        try:
            self.url = f"http://{_poll(self._address, 'prometheus to listen', self.log)}"
            _poll(self._ready, "prometheus to be ready", self.log)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        """Returns what it has logged."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def api(self, path: str, **parameters: str) -> Any:
        """Returns `data` of an answer of the HTTP API, such as `api("targets")`."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def query(self, promql: str) -> list[Sample]:
        """Returns the instant vector (or scalar) that an expression evaluates to now."""
        data = self.api("query", query=promql)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(found["metric"], float(found["value"][1])) for found in data["result"]]

    def wait_for(self, promql: str, seconds: float = 60) -> list[Sample]:
        """Returns the first answer that is not empty. Fails the test after `seconds`."""
        return _poll(lambda: self.query(promql), f"an answer to {promql}", self.log, seconds)

    def _address(self) -> str | None:
        if self._process.poll() is not None:
            pytest.fail(f"prometheus has ended:\n{self.log()}")
        found = _LISTENING.search(self.log())
        return found and found[1]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=30) as response:
                return bool(response.status == 200)
        except OSError:
            return False


class PrometheusFactory(Protocol):
    """Starts a Prometheus that is stopped after the test; the arguments are those of `PrometheusServer`."""

    def __call__(self, scrape_configs: Sequence[dict[str, Any]], **settings: Any) -> PrometheusServer: ...


@pytest.fixture
def prometheus_factory(tmp_path: Path) -> Iterator[PrometheusFactory]:
    """Starts Prometheus servers, each with a directory of its own, and stops them after the test."""
    with ExitStack() as stack:
        started = 0

        def start(scrape_configs: Sequence[dict[str, Any]], **settings: Any) -> PrometheusServer:
            nonlocal started
            started += 1
            directory = tmp_path / f"prometheus-{started}"
            directory.mkdir()
            return stack.enter_context(PrometheusServer(directory, scrape_configs, **settings))

        yield start


def _poll(ask: Callable[[], _Answer], what: str, log: Callable[[], str], seconds: float = 60) -> _Answer:
    """Returns the first answer that is true."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s for {what}:\n{log()[-4000:]}")
        time.sleep(_POLL_SECONDS)
    return answer

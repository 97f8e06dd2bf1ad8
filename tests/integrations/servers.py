"""Real servers on loopback, started for a test and ended with it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from typing import Any

START_SECONDS = 60
"""How long a server may take to be ready on a machine that is busy with other tests."""


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], ready_url: str, log: Path) -> Iterator[None]:
    """Runs a server until the block ends; the block begins once it answers."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _wait(process, ready_url, log)
            yield
        finally:
            process.terminate()
            process.wait(20)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.args} is not ready:\n{log.read_text()[-3000:]}")


@contextmanager
def prometheus(
    directory: Path, config: str = "", *, data: Path | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """Runs Prometheus with this configuration and, where given, over this data; yields its address.

    Its own port takes the place of `{port}` in the configuration.
    """
    file = directory / "prometheus.yml"
    port = free_port()
    file.write_text(config.replace("{port}", str(port)))
    url = f"http://127.0.0.1:{port}"
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={data or directory / 'data'}",
        "--storage.tsdb.retention.time=10y",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--log.level=warn",
        *options,
    ]
    with server(command, f"{url}/-/ready", directory / "prometheus.log"):
        yield url


def ask(url: str, path: str, **parameters: str) -> Any:
    """Returns the data of an answer of Prometheus's interface."""
    query = urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=60) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error


@contextmanager
def alertmanager(directory: Path, config: str) -> Iterator[str]:
    """Runs Alertmanager with this configuration; yields its address."""
    file = directory / "alertmanager.yml"
    file.write_text(config)
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager",
        f"--config.file={file}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--cluster.listen-address=",
    ]
    with server(command, f"{url}/-/ready", directory / "alertmanager.log"):
        yield url


class Webhook:
    """Receives what Alertmanager sends, until `close()`."""

    def __init__(self) -> None:
        self._arrived: list[dict[str, Any]] = []
        self._news = Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with webhook._news:
                    webhook._arrived += [{"path": self.path, **alert} for alert in body["alerts"]]
                    webhook._news.notify_all()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def firing(self) -> list[dict[str, Any]]:
        """Returns the alerts that have arrived firing."""
        with self._news:
            return [alert for alert in self._arrived if alert["status"] == "firing"]

    def wait_for(self, name: str, seconds: float = 90) -> dict[str, Any]:
        """Returns the first firing alert of this name; fails where none arrives in time."""

        def found() -> dict[str, Any] | None:
            fired = (alert for alert in self._arrived if alert["status"] == "firing")
            return next((alert for alert in fired if alert["labels"]["alertname"] == name), None)

        with self._news:
            alert = self._news.wait_for(found, seconds)
            assert alert is not None, f"no {name} arrived, but {[a['labels'] for a in self._arrived]}"
            return alert

    def close(self) -> None:
        """Stops listening."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

"""Metrics pushed to an OpenTelemetry collector: a real HTTP server here, which reads the protobuf."""

from __future__ import annotations

import gzip
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from records import counted_step, full_snapshot, traced_step
from small_training import make, step

from memtrace import MemoryTracer, TracerConfig
from memtrace.cli import main
from memtrace.errors import ConfigError, MissingPackageError
from memtrace.exporters.otlp import push as push_module
from memtrace.exporters.otlp.metrics import metrics_url
from memtrace.exporters.otlp.push import OtlpPush
from memtrace.exporters.prometheus import registry_of
from memtrace.exporters.run_directory.run_file import RunFile, run_file_path
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.record.categories import Category, Moment
from memtrace.record.snapshot import RunIdentity, RunState

TESTS = Path(__file__).parents[1]
Points = list[tuple[dict[str, str], float, int]]
"""Attributes, value and time of each point."""


class Collector:
    """What a receiver has got."""

    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.status = 200
        self.came = threading.Semaphore(0)
        self.url = ""

    def resource(self, number: int = -1) -> dict[str, Any]:
        attributes = self.requests[number].resource_metrics[0].resource.attributes
        return {each.key: each.value.string_value or each.value.int_value for each in attributes}

    def metrics(self, number: int = -1) -> dict[str, Any]:
        (scope,) = self.requests[number].resource_metrics[0].scope_metrics
        return {metric.name: metric for metric in scope.metrics}

    def points(self, name: str, number: int = -1) -> Points:
        metric = self.metrics(number)[name]
        found = getattr(metric, metric.WhichOneof("data")).data_points
        return [
            (
                {each.key: each.value.string_value for each in point.attributes},
                getattr(point, point.WhichOneof("value")),
                point.time_unix_nano,
            )
            for point in found
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver of OTLP over HTTP on a port of its own."""
    got = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if got.status == 200:
                got.requests.append(ExportMetricsServiceRequest.FromString(body))
                got.headers.append(dict(self.headers.items()))
                got.paths.append(self.path)
            self.send_response(got.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            got.came.release()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        got.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield got
        finally:
            http.shutdown()
            thread.join()


def test_a_push_says_what_a_scrape_says(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of the exposition with the same labels and value, the rank as resource, the device as hw.gpu."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=nlp,dl.rank=9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    snapshot = full_snapshot()
    OtlpPush(lambda: snapshot, collector.url).close()
    assert collector.paths == ["/v1/metrics"]
    assert collector.headers[0]["api-key"] == "secret"
    scraped = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in registry_of(lambda: snapshot).collect()
        for sample in family.samples
    }
    pushed = {
        (name, frozenset(labels.items())): value
        for name in collector.metrics()
        if name.startswith("memtrace_")
        for labels, value, _ in collector.points(name)
    }
    assert pushed == scraped
    metrics = collector.metrics()
    assert metrics["memtrace_steps_total"].sum.is_monotonic
    assert metrics["memtrace_memory_bytes"].unit == "By"
    assert metrics["memtrace_memory_bytes"].WhichOneof("data") == "gauge"
    device = snapshot.device
    assert device is not None
    labels = {"hw.id": "GPU-1234", "hw.name": "NVIDIA H100"}
    assert [point[:2] for point in collector.points("hw.gpu.memory.usage")] == [(labels, device.used_bytes)]
    assert [point[:2] for point in collector.points("hw.gpu.memory.limit")] == [(labels, device.total_bytes)]
    assert collector.points("hw.gpu.memory.utilization")[0][1] == device.used_bytes / device.total_bytes
    assert not metrics["hw.gpu.memory.usage"].sum.is_monotonic
    resource = collector.resource()
    assert resource["service.name"] == resource["memtrace.run"] == "llama"
    assert (resource["memtrace.gpu_uuid"], resource["dl.world_size"]) == ("GPU-1234", 2)
    assert (resource["team"], resource["dl.rank"]) == ("nlp", "9")  # what the user's variables say goes first
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    OtlpPush(lambda: snapshot, collector.url + "/v1/metrics/").close()
    assert collector.resource()["service.name"] == "mine"
    assert collector.paths[1] == "/v1/metrics"


def test_a_run_is_pushed_while_it_goes_on_and_at_its_end(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the setting, from a thread that is gone after detach; the last push says how it has ended."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 1, "log_dir": tmp_path, "quiet": True, "run_name": "llama"}
    with MemoryTracer(model, optimizer, TracerConfig(otlp_endpoint="env", **settings)) as tracer:
        step(model, optimizer, 6)
        assert collector.came.acquire(timeout=60)
        assert collector.came.acquire(timeout=60)
        record = tracer.latest
    assert not [thread for thread in threading.enumerate() if thread.name == "memtrace-otlp"]
    assert record is not None
    peak = {Category(labels["category"]): 0 for labels, _, _ in collector.points("memtrace_memory_bytes")}
    for labels, value, _ in collector.points("memtrace_memory_bytes"):
        if labels["moment"] == Moment.PEAK:
            peak[Category(labels["category"])] += int(value)
    assert {name: size for name, size in peak.items() if size} == record.moments[Moment.PEAK].by_category()
    assert collector.points("memtrace_run_state")[0][0]["state"] == "ok"
    states = [collector.points("memtrace_run_state", at)[0][0]["state"] for at in range(len(collector.requests))]
    assert states[0] == "running"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    so_far = len(collector.requests)
    with MemoryTracer(model, optimizer, TracerConfig(otlp_endpoint=collector.url, **settings)):
        step(model, optimizer, 6)
    assert len(collector.requests) == so_far


def test_a_collector_that_refuses_costs_one_warning(
    collector: Collector, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on; a finished run that is pushed by hand ends with status 2 and the step."""
    collector.status = 400
    snapshot = full_snapshot()
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        push = OtlpPush(lambda: snapshot, collector.url, interval_seconds=0.01)
        for _ in range(3):
            assert collector.came.acquire(timeout=60)
        push.close()
    (warning,) = [record.getMessage() for record in caplog.records]  # and none of the SDK's own, one for each try
    assert warning.startswith(f"memtrace: the collector at {collector.url} does not take the metrics of rank 1, ")
    assert "400" in warning
    assert logging.getLogger(OTLPMetricExporter.__module__).filters == []
    with StepLog(step_log_path(tmp_path, 1)) as log:
        log.write(traced_step())
    assert main(["export", str(tmp_path), "--otlp", collector.url]) == 2
    assert "does not take the metrics of rank 1 from step 12 on" in capsys.readouterr().err


def test_a_finished_run_is_pushed_step_by_step(collector: Collector, tmp_path: Path) -> None:
    """Each step's figures with the time that it had, those of all ranks, and how the run has ended."""
    for rank in (0, 1):
        with StepLog(step_log_path(tmp_path, rank)) as log:
            for number in range(1, 70):
                made = traced_step if number % 10 == 1 else counted_step
                log.write(made(step=number, rank=rank, unix_seconds=1000.0 + number, run_id="a"))
    identity = RunIdentity(run_name="llama", run_id="a", rank=1, world_size=2, model="Llama")
    RunFile(run_file_path(tmp_path, 1), identity, None).end(RunState.EXCEPTION)
    assert main(["export", str(tmp_path), "--otlp", collector.url]) == 0
    ranks = [collector.resource(at)["dl.rank"] for at in range(len(collector.requests))]
    assert ranks == [0, 0, 0, 1, 1, 1]
    steps = [point for at in (3, 4, 5) for point in collector.points("memtrace_steps_total", at)]
    assert [(value, at // 10**9) for _, value, at in steps[:-1]] == [(n, 1000 + n) for n in range(1, 70)]
    assert len({at for _, _, at in steps}) == len(steps) == 70
    assert collector.points("memtrace_run_state")[-1][0]["state"] == "exception"
    traced = [value for at in (3, 4, 5) for _, value, _ in collector.points("memtrace_traced_steps_total", at)]
    assert traced[-1] == 7
    resource = collector.resource()
    assert (resource["memtrace.model"], resource["memtrace.run_id"]) == ("Llama", "a")
    assert resource["memtrace.gpu_uuid"] == "GPU-1234"


def test_a_script_that_ends_without_detach_pushes_how_it_has_ended(collector: Collector, tmp_path: Path) -> None:
    """The last figures are pushed as the interpreter exits."""
    script = tmp_path / "script.py"
    script.write_text(
        "from small_training import make, step\n"
        "from memtrace import MemoryTracer\n"
        "model, optimizer = make()\n"
        "MemoryTracer(model, optimizer, port=None, quiet=True, strict=True).attach()\n"
        "step(model, optimizer, 6)\n"
        "raise ValueError('over')\n"
    )
    environment = os.environ | {
        "MEMTRACE_OTLP_ENDPOINT": collector.url,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert len(collector.requests) == 1
    assert collector.points("memtrace_run_state")[0][0]["state"] == "exception"
    assert collector.points("memtrace_steps_total")[0][1] == 1
    assert collector.resource()["service.name"] == "script"


def test_the_reason_is_said_where_the_end_comes_first(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends while the SDK tries again says what the collector has answered, not that the run has ended."""
    collector.status = 503
    monkeypatch.setattr(push_module, "LAST_PUSH_SECONDS", 0)
    snapshot = full_snapshot()
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        push = OtlpPush(lambda: snapshot, collector.url, interval_seconds=600)
        push.end()
        for _ in range(2):
            assert collector.came.acquire(timeout=60)
        push.close()
        push._thread.join()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "Transient error Service Unavailable" in warning


def test_variables_that_the_sdk_does_not_take_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before training, as a setting is; an address that is none when it is used."""
    with StepLog(step_log_path(tmp_path, 1)) as log:
        log.write(traced_step())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere:4318")
    assert main(["export", str(tmp_path), "--otlp", "env"]) == 2
    assert "does not take the metrics of rank 1 from step 12 on: " in capsys.readouterr().err
    refused = ValueError("'brotli' is not a valid Compression")  # as older versions of the SDK say it
    monkeypatch.setattr("memtrace.exporters.otlp.metrics.OTLPMetricExporter", mock.Mock(side_effect=refused))
    model, optimizer = make()
    with pytest.raises(ConfigError, match=r"look at the OTEL_EXPORTER_OTLP_\* variables: .*brotli"):
        MemoryTracer(model, optimizer, port=None, log_dir=tmp_path, otlp_endpoint="env", quiet=True).attach()
    assert main(["export", str(tmp_path), "--otlp", "localhost"]) == 2
    assert "--otlp must be an address such as http://localhost:4318, or env" in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://host:4317", "", 7, "http://", "http://host:x"])
def test_what_is_no_address_is_said(endpoint: Any) -> None:
    """Before the run, with an address as example."""
    with pytest.raises(ConfigError, match=r"otlp_endpoint must be an address such as http://localhost:4318, or env"):
        TracerConfig(otlp_endpoint=endpoint)


def test_an_address_may_have_a_path() -> None:
    """As a vendor's has; the path of the signal is put behind it once."""
    assert metrics_url("https://otlp.example.com/otlp/") == "https://otlp.example.com/otlp/v1/metrics"
    assert metrics_url("https://otlp.example.com:443/v1/metrics") == "https://otlp.example.com:443/v1/metrics"
    assert metrics_url("env") is None


def test_without_the_extra_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training; nothing is left open."""
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "memtrace.exporters.otlp"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    model, optimizer = make()
    tracer = MemoryTracer(model, optimizer, port=None, log_dir=tmp_path, otlp_endpoint="env", quiet=True)
    with pytest.raises(MissingPackageError, match=r"otlp_endpoint needs opentelemetry.*torch-memtrace\[otlp\]"):
        tracer.attach()
    assert not tracer.attached

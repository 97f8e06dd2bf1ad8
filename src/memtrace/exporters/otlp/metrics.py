"""OpenTelemetry: what a snapshot says as metrics of the SDK, and the exporter that sends them (OTLP over HTTP).

The SDK's variables are honoured: headers, certificates, compression and timeout (`OTEL_EXPORTER_OTLP_*`), the service's
name and further attributes (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`), the interval (`OTEL_METRIC_EXPORT_*`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import memtrace
from memtrace.errors import ConfigError
from memtrace.exporters.series import READERS
from memtrace.record.metric import Metric, MetricType, Unit
from memtrace.record.metrics import CATALOGUE
from memtrace.record.snapshot import RunIdentity, Snapshot

BY_ENVIRONMENT = "env"
"""The endpoint that stands for what the SDK's variables say, or its default."""

Stamped = tuple[Snapshot, int]
"""A state, and when it was, nanoseconds since 1970."""
Point = tuple[Mapping[str, str], int | float]

_PATH = "/v1/metrics"
_UNITS = {
    Unit.BYTES: "By",
    Unit.SECONDS: "s",
    Unit.RATIO: "1",
    Unit.WATTS: "W",
    Unit.CELSIUS: "Cel",
    Unit.NONE: "1",
}


def metrics_url(endpoint: str) -> str | None:
    """Returns where an endpoint takes metrics: with `/v1/metrics` where it has not that; None for the variables'."""
    if endpoint == BY_ENVIRONMENT:
        return None
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path if path.endswith(_PATH) else path + _PATH))


def metric_exporter(endpoint: str) -> OTLPMetricExporter:
    """Returns the SDK's exporter for an endpoint.

    Raises:
        ConfigError: a variable of the SDK has a value that it does not take.
    """
    try:
        return OTLPMetricExporter(endpoint=metrics_url(endpoint))
    except (ValueError, OSError) as error:
        raise ConfigError(f"metrics cannot be pushed, look at the OTEL_EXPORTER_OTLP_* variables: {error}") from error


def resource_of(identity: RunIdentity, host: str, pid: int) -> Resource:
    """Returns what produces the metrics: the rank, named by its run. What the variables say goes first."""
    told: dict[str, str | int] = {
        "service.name": identity.run_name,
        "service.instance.id": f"{identity.run_id}-rank{identity.rank}",
        "host.name": host,
        "process.pid": pid,
        "dl.rank": identity.rank,
        "dl.local_rank": identity.local_rank,
        "dl.world_size": identity.world_size,
        "memtrace.run": identity.run_name,
        "memtrace.run_id": identity.run_id,
        "memtrace.device": identity.device,
    }
    if identity.gpu_uuid:
        told["memtrace.gpu_uuid"] = identity.gpu_uuid
    if identity.model:
        told["memtrace.model"] = identity.model
    known = {name: _encodable(value) if isinstance(value, str) else value for name, value in told.items()}
    return Resource.create({**known, **OTELResourceDetector().detect().attributes})


def metrics_data(resource: Resource, stamped: Sequence[Stamped]) -> export.MetricsData:
    """Returns states of one rank as metrics: those of the catalogue, and `hw.gpu.memory.*` of its device.

    All points of one state have its time. What is not known has no point.
    """
    found = [*_own(stamped), *_hardware(stamped)]
    scope = InstrumentationScope("memtrace", memtrace.__version__)
    scoped = export.ScopeMetrics(scope=scope, metrics=found, schema_url="")
    return export.MetricsData([export.ResourceMetrics(resource=resource, scope_metrics=[scoped], schema_url="")])


def _own(stamped: Sequence[Stamped]) -> Iterator[export.Metric]:
    for metric in CATALOGUE:
        points = [point for state in stamped for point in _points(state, _samples(metric, state[0]))]
        if points:
            counted = metric.type is MetricType.COUNTER
            data = _sum(points, is_monotonic=True) if counted else export.Gauge(data_points=points)
            yield export.Metric(name=metric.name, description=metric.help, unit=_UNITS[metric.unit], data=data)


def _samples(metric: Metric, snapshot: Snapshot) -> Iterator[Point]:
    identity = {"rank": str(snapshot.identity.rank)}
    if snapshot.identity.gpu_uuid:
        identity["gpu_uuid"] = snapshot.identity.gpu_uuid
    for labels, value in READERS[metric](snapshot):
        if value is not None and math.isfinite(value):
            yield {name: _encodable(text) for name, text in (labels | identity).items()}, value


def _hardware(stamped: Sequence[Stamped]) -> Iterator[export.Metric]:
    """Yields the device's memory under the names of OpenTelemetry's conventions for hardware; nothing on a CPU."""
    limit: list[export.NumberDataPoint] = []
    usage: list[export.NumberDataPoint] = []
    share: list[export.NumberDataPoint] = []
    for snapshot, at_ns in stamped:
        device, uuid = snapshot.device, snapshot.identity.gpu_uuid
        if device is None or not uuid or not snapshot.up:
            continue
        labels = {"hw.id": uuid} | ({"hw.name": _encodable(device.name)} if device.name else {})
        total, used = device.total_bytes, device.used_bytes
        limit += _points((snapshot, at_ns), [] if total is None else [(labels, total)])
        usage += _points((snapshot, at_ns), [] if used is None else [(labels, used)])
        share += _points((snapshot, at_ns), [] if used is None or not total else [(labels, used / total)])
    if limit:
        data = _sum(limit, is_monotonic=False)
        yield export.Metric("hw.gpu.memory.limit", "Size of the GPU memory.", "By", data)
    if usage:
        data = _sum(usage, is_monotonic=False)
        yield export.Metric("hw.gpu.memory.usage", "GPU memory used.", "By", data)
    if share:
        text = "Fraction of GPU memory used."
        yield export.Metric("hw.gpu.memory.utilization", text, "1", export.Gauge(data_points=share))


def _sum(points: Sequence[export.NumberDataPoint], *, is_monotonic: bool) -> export.Sum:
    cumulative = export.AggregationTemporality.CUMULATIVE
    return export.Sum(data_points=points, aggregation_temporality=cumulative, is_monotonic=is_monotonic)


def _points(state: Stamped, samples: Iterator[Point] | Sequence[Point]) -> Iterator[export.NumberDataPoint]:
    snapshot, at_ns = state
    begun_ns = round((snapshot.begun_unix_seconds or 0.0) * 1e9)
    for labels, value in samples:
        yield export.NumberDataPoint(
            attributes=labels,
            start_time_unix_nano=begun_ns,
            time_unix_nano=at_ns,
            value=int(value) if isinstance(value, bool) else value,
        )


def _encodable(text: str) -> str:
    """Replaces what UTF-8 cannot carry, such as the bytes of a script's name in another encoding."""
    return text.encode(errors="replace").decode()

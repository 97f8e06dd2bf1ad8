"""Prometheus: one collector that turns one immutable Snapshot into samples at scrape time.

Nothing is kept between two scrapes, so no series outlives what it describes, and all series of a scrape belong to the
same instant. A collector cannot fail on a valid Snapshot; what cannot be told has no sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from memtrace.exporters.series import READERS, Labels
from memtrace.record.metric import Metric, MetricType
from memtrace.record.metrics import CATALOGUE, RUN_INFO
from memtrace.record.snapshot import Snapshot


class SnapshotCollector(Collector):
    """Collects the metrics of the catalogue from the snapshot of the moment.

    Args:
        source: returns the newest snapshot. It is called once a scrape, from the server's threads, and must not raise.
        name_run: whether every series has the labels `run` and `run_id`, for a place where runs lie beside each other.
            Then there is no `memtrace_run_info`, which gives those labels to the series of an endpoint: two of them
            under one instance and rank would make each query fail that joins with it.
    """

    def __init__(self, source: Callable[[], Snapshot], *, name_run: bool = False) -> None:
        self._source = source
        self._name_run = name_run

    def describe(self) -> Iterator[Family]:
        """Yields the metrics without samples, so that registering the collector takes no snapshot."""
        return map(_family, CATALOGUE)

    def collect(self) -> Iterator[Family]:
        """Yields each metric that has samples now."""
        snapshot = self._source()
        identity = _identity_labels(snapshot)
        if self._name_run:
            identity["run"] = snapshot.identity.run_name
            if snapshot.identity.run_id:
                identity["run_id"] = snapshot.identity.run_id
        for metric in CATALOGUE:
            if self._name_run and metric is RUN_INFO:
                continue
            family = _family(metric)
            for labels, value in READERS[metric](snapshot):
                if value is not None and math.isfinite(value):
                    family.add_sample(metric.name, _encodable(labels | identity), value)
            if family.samples:
                yield family


def registry_of(source: Callable[[], Snapshot], *, name_run: bool = False) -> prometheus_client.CollectorRegistry:
    """Returns a registry of its own with one `SnapshotCollector`; the process-wide registry is left alone."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(SnapshotCollector(source, name_run=name_run))
    return registry


def render_text(snapshot: Snapshot) -> str:
    """Returns a snapshot in the text exposition format."""
    return prometheus_client.generate_latest(registry_of(lambda: snapshot)).decode()


def _family(metric: Metric) -> Family:
    """Returns the client library's form of a metric; it adds the suffix of the type itself."""
    suffix = {MetricType.COUNTER: "_total", MetricType.INFO: "_info"}.get(metric.type, "")
    return Family(metric.name.removesuffix(suffix), metric.help, metric.type.value)


def _identity_labels(snapshot: Snapshot) -> Labels:
    labels = {"rank": str(snapshot.identity.rank)}
    if snapshot.identity.gpu_uuid:
        labels["gpu_uuid"] = snapshot.identity.gpu_uuid
    return labels


def _encodable(labels: Labels) -> Labels:
    """Replaces what UTF-8 cannot carry, such as the bytes of a script's name in another encoding."""
    return {name: text.encode(errors="replace").decode() for name, text in labels.items()}

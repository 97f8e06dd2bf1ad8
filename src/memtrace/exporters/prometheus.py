"""Prometheus: one collector that turns one immutable Snapshot into samples at scrape time.

Nothing is kept between two scrapes, so no series outlives what it describes, and all series of a scrape belong to the
same instant. A collector cannot fail on a valid Snapshot; what cannot be told has no sample.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import prometheus_client
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from memtrace.errors import OutputError
from memtrace.exporters.series import READERS, Labels
from memtrace.metrics import CATALOGUE, Metric, MetricType
from memtrace.snapshot import Snapshot


class SnapshotCollector(Collector):
    """Collects the metrics of the catalogue from the snapshot of the moment.

    Args:
        source: returns the newest snapshot. It is called once a scrape, from the server's threads, and must not raise.
    """

    def __init__(self, source: Callable[[], Snapshot]) -> None:
        self._source = source

    def describe(self) -> Iterator[Family]:
        """Yields the metrics without samples, so that registering the collector takes no snapshot."""
        return map(_family, CATALOGUE)

    def collect(self) -> Iterator[Family]:
        """Yields each metric that has samples now."""
        snapshot = self._source()
        identity = _identity_labels(snapshot)
        for metric in CATALOGUE:
            family = _family(metric)
            for labels, value in READERS[metric](snapshot):
                if value is not None and math.isfinite(value):
                    family.add_sample(metric.name, _encodable(labels | identity), value)
            if family.samples:
                yield family


def registry_of(source: Callable[[], Snapshot]) -> prometheus_client.CollectorRegistry:
    """Returns a registry of its own with one `SnapshotCollector`; the process-wide registry is left alone."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(SnapshotCollector(source))
    return registry


def render_text(snapshot: Snapshot) -> str:
    """Returns a snapshot in the text exposition format."""
    return prometheus_client.generate_latest(registry_of(lambda: snapshot)).decode()


def textfile_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank leaves its metrics in the directory of a textfile collector."""
    return Path(directory) / f"memtrace-rank{rank}.prom"


def write_textfile(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Writes a snapshot for the textfile collector of node_exporter, which reads files ending in `.prom`.

    The file is written beside its place and renamed: a reader sees the old one or the new one. Its directory is made
    where it is missing.

    Raises:
        OutputError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prometheus_client.write_to_textfile(str(target), registry_of(lambda: snapshot))
    except OSError as error:
        raise OutputError(f"the metrics file {target} cannot be written: {error.strerror or error}") from error


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

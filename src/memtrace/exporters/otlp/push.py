"""Metrics pushed to an OpenTelemetry collector while a run goes on, from a thread of its own."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExportResult

from memtrace.exporters.otlp.metrics import metric_exporter, metrics_data, resource_of
from memtrace.guard import ask
from memtrace.record.snapshot import Snapshot

logger = logging.getLogger("memtrace")

DEFAULT_INTERVAL_SECONDS = 60.0
"""As the SDK has it, where `OTEL_METRIC_EXPORT_INTERVAL` (milliseconds) says nothing."""
LONGEST_PAUSE_SECONDS = 600.0
"""The pause doubles with each push that fails, up to this."""
LAST_PUSH_SECONDS = 3.0
"""What the end of a run waits at most until the collector has the last figures."""


class _Kept(logging.Filter):
    """Keeps what the SDK logs on one thread, tries and retries, out of the user's log.

    What it says first of a push is why that fails; what follows is about retries. The logger is the process's: it is
    given back with `close()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ""
        """Of the push in progress, or of the last one."""
        self._thread = threading.get_ident()
        self._logger = logging.getLogger(OTLPMetricExporter.__module__)
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is to be logged: those of other threads are."""
        if record.thread != self._thread:
            return True
        self.first = self.first or record.getMessage()
        return False

    def close(self) -> None:
        """Takes the filter off."""
        self._logger.removeFilter(self)


class OtlpPush:
    """Pushes the state of a tracer at intervals, and once more at its end.

    Its life ends with `close()`, which waits for the last push for a few seconds at most, or with `end()`, which waits
    for nothing and may run within the garbage collector. Nothing is pushed from a forked child, which has no thread.

    Args:
        source: returns the newest state. Called from the thread.
        endpoint: base address of the collector, or `env` for what the SDK's variables say.
        interval_seconds: pause between two pushes; None for what the variables say.
    """

    def __init__(self, source: Callable[[], Snapshot], endpoint: str, *, interval_seconds: float | None = None) -> None:
        self._source = source
        self._endpoint = endpoint
        self._interval = _interval_by_environment() if interval_seconds is None else interval_seconds
        self._exporter = metric_exporter(endpoint)
        # Now, since the SDK asks on further threads, which cannot be started once the interpreter exits.
        self._identity = source().identity
        self._resource = resource_of(self._identity, socket.gethostname(), os.getpid())
        self._failed = False
        self._at_work = threading.Lock()
        """Held until the thread is to end. A lock, since `end` may run inside the collector of garbage, on any thread:
        an Event would wait there for a lock of its own."""
        self._at_work.acquire()
        self._thread = threading.Thread(target=self._push_until_the_end, name="memtrace-otlp", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Tells the thread to push once more and to end, without waiting for it."""
        with suppress(RuntimeError):  # it was told already
            self._at_work.release()

    def close(self) -> None:
        """Does the same, and waits for it as long as `LAST_PUSH_SECONDS`; a push that takes longer is given up."""
        self.end()
        self._thread.join(LAST_PUSH_SECONDS)
        if self._thread.is_alive():
            ask(self._exporter.shutdown)  # ends its pauses between tries

    def _push_until_the_end(self) -> None:
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # no spans of our own requests in the user's traces
        pause = self._interval
        with closing(_Kept()) as said:
            while not self._at_work.acquire(timeout=pause):
                arrived = self._push(said)
                pause = self._interval if arrived else min(2 * pause, max(self._interval, LONGEST_PAUSE_SECONDS))
            self._push(said)
            ask(self._exporter.shutdown)

    def _push(self, said: _Kept) -> bool:
        """Pushes the state of now; returns whether the collector has it. The first failure is logged."""
        said.first = ""
        arrived = ask(self._export) is MetricExportResult.SUCCESS
        if not arrived and not self._failed:
            self._failed = True
            logger.warning(
                "memtrace: the collector at %s does not take the metrics of rank %d, they are offered again: %s",
                self._endpoint,
                self._identity.rank,
                said.first or "no answer",
            )
        return arrived

    def _export(self) -> MetricExportResult:
        return self._exporter.export(metrics_data(self._resource, [(self._source(), time.time_ns())]))


def push_to(source: Callable[[], Snapshot], endpoint: str) -> OtlpPush | None:
    """Returns a push at work; None where `OTEL_SDK_DISABLED` forbids it."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    return OtlpPush(source, endpoint)


def _interval_by_environment() -> float:
    with suppress(KeyError, ValueError):
        interval = float(os.environ["OTEL_METRIC_EXPORT_INTERVAL"]) / 1000
        if interval > 0:
            return min(interval, threading.TIMEOUT_MAX)
    return DEFAULT_INTERVAL_SECONDS

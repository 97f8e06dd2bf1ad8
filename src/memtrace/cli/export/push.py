"""What `memtrace export --otlp` does: every step of a run, pushed to a collector with the time that it had."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import islice

from opentelemetry.sdk.metrics.export import MetricExportResult

from memtrace.cli.run_logs import RankLog
from memtrace.config import check_otlp_endpoint
from memtrace.errors import OutputError
from memtrace.exporters.otlp.metrics import Stamped, metric_exporter, metrics_data, resource_of
from memtrace.exporters.otlp.replay import states
from memtrace.record.breakdown import StepRecord
from memtrace.record.snapshot import RunIdentity, RunState

_STATES = 32
"""Steps of one request: about 2,000 points."""


def push_run(endpoint: str, name: str, logs: list[RankLog]) -> None:
    """Pushes the steps of each rank, oldest first.

    Raises:
        ConfigError: the address is none.
        LogFormatError: a log cannot be read.
        OutputError: the collector does not take them.
    """
    check_otlp_endpoint("--otlp", endpoint)
    exporter = metric_exporter(endpoint)
    for log in logs:
        records, status = log.records(), log.status()
        identity = _identity(log, name, records[-1])
        host, pid = (socket.gethostname(), 0) if status is None else (status.process.host, status.process.pid)
        resource = resource_of(identity, host, pid)
        ended = None if status is None or status.state is RunState.RUNNING else status.state
        for some in _batches(_stamped(records, identity, ended)):
            step = some[0][0].latest
            refused = (
                f"the collector at {endpoint} does not take the metrics of rank {log.rank} from step "
                f"{0 if step is None else step.step} on"
            )
            try:
                arrived = exporter.export(metrics_data(resource, some))
            except (OSError, ValueError) as error:  # an address in a variable that is none
                raise OutputError(f"{refused}: {error}") from error
            if arrived is not MetricExportResult.SUCCESS:
                raise OutputError(f"{refused}: the lines above say why")
    exporter.shutdown()


def _stamped(records: list[StepRecord], identity: RunIdentity, ended: RunState | None) -> Iterator[Stamped]:
    for state in states(records, identity, ended):
        assert state.latest is not None
        # The last state has the time of the step before it, and a millisecond: two points of one time are an error.
        later = 0 if state.state is RunState.RUNNING else 1_000_000
        yield state, round(state.latest.unix_seconds * 1e9) + later


def _batches(stamped: Iterator[Stamped]) -> Iterator[list[Stamped]]:
    while some := list(islice(stamped, _STATES)):
        yield some


def _identity(log: RankLog, name: str, record: StepRecord) -> RunIdentity:
    status, device = log.status(), record.device_memory
    return RunIdentity(
        run_name=log.name(name),
        run_id=log.run_id,
        rank=log.rank,
        world_size=1 if status is None else status.world_size,
        device=record.device,
        gpu_uuid=None if device is None else device.uuid,
        model="" if status is None else status.model,
    )

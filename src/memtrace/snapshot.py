"""The immutable state of one tracer, as exporters read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from memtrace.breakdown import Breakdown, DeviceReading, StepRecord
from memtrace.categories import Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """Which process of which run this is; constant while it lives."""

    run_name: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    gpu_uuid: str | None = None
    """The full `GPU-...` or `MIG-...` form; None on a CPU or where the driver does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counters since the tracer was attached."""

    steps: int = 0
    traced_steps: int = 0
    self_seconds: float = 0.0
    ooms: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything an exporter may show, taken together: swapped as a whole, never changed."""

    identity: RunIdentity
    up: bool = True
    """False once a fault inside memtrace switched it off."""
    totals: Totals = field(default_factory=Totals)
    latest: StepRecord | None = None
    latest_traced: StepRecord | None = None
    device_memory: DeviceReading | None = None
    """The newest reading of the device, which may be newer than the one in `latest`."""
    limit_bytes: int | None = None
    """What the run may use of the device: `device_limit_bytes`, else the device's total."""
    plan: Mapping[Moment, Breakdown] = field(default_factory=dict)
    """The plan the run was given, to be shown beside what was measured."""

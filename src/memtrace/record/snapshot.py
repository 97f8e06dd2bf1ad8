"""The immutable state of one tracer, as exporters read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from memtrace.record.breakdown import AllocatorReading, Breakdown, DeviceReading, StepRecord, ordered_entries
from memtrace.record.categories import PERSISTENT, Moment
from memtrace.record.limitations import Unseen
from memtrace.record.risk_reading import RiskReading


class RunState(StrEnum):
    """Whether a run goes on, or how it ended. A process that was killed outright (SIGKILL) leaves `running` behind."""

    RUNNING = "running"
    OK = "ok"
    EXCEPTION = "exception"
    """With an exception that nobody has caught."""
    OUT_OF_MEMORY = "out_of_memory"
    """With such an exception that says that the device's memory has run out."""
    SIGNAL = "signal"
    """After a SIGTERM, or interrupted by SIGINT."""

    @property
    def words(self) -> str:
        """How the run is, for people."""
        return {
            RunState.RUNNING: "running",
            RunState.OK: "ended",
            RunState.EXCEPTION: "ended by an exception",
            RunState.OUT_OF_MEMORY: "ended out of memory",
            RunState.SIGNAL: "ended by a signal",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """Which process of which run this is; constant while it lives."""

    run_name: str
    run_id: str = ""
    """Of the launch: the same on all its ranks, another one each time that the script is started. Empty before the
    tracer is attached."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    gpu_uuid: str | None = None
    """The full `GPU-...` or `MIG-...` form; None on a CPU or where the driver does not say."""
    model: str = ""
    """Class of the trained model, without what wraps it, and the name or path it was loaded from where it says that.
    Empty before the tracer is attached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counters since the tracer was attached."""

    steps: int = 0
    skipped_steps: int = 0
    """Those of `steps` that were skipped without a record."""
    traced_steps: int = 0
    self_seconds: float = 0.0
    slowed_seconds: float = 0.0
    ooms: int = 0
    """Failed allocations that ended what the loop was doing; the allocator's own count has those that torch catches."""
    retries: int = 0
    peak_counter_resets: int = 0
    highest_peak_bytes: int | None = None
    """The highest peak of a step so far; None before one was known."""

    def with_skipped(self, skipped_steps: int) -> Totals:
        """Returns the counters when so many steps in all have been skipped."""
        return replace(self, steps=self.steps + skipped_steps - self.skipped_steps, skipped_steps=skipped_steps)

    def after(self, record: StepRecord) -> Totals:
        """Returns the counters after one more step that has a record."""
        told, peak = record.allocator, record.moments.get(Moment.PEAK)
        known = [
            size for size in (self.highest_peak_bytes, None if peak is None else peak.held_bytes) if size is not None
        ]
        return Totals(
            steps=self.steps + 1,
            skipped_steps=self.skipped_steps,
            traced_steps=self.traced_steps + record.traced,
            self_seconds=self.self_seconds + record.self_seconds,
            slowed_seconds=self.slowed_seconds + record.slowed_seconds,
            ooms=self.ooms,
            retries=self.retries if told is None or told.retries is None else told.retries,
            peak_counter_resets=self.peak_counter_resets + record.peak_counter_reset,
            highest_peak_bytes=max(known, default=None),
        )

    def after_oom(self) -> Totals:
        """Returns the counters after one more failed allocation."""
        return replace(self, ooms=self.ooms + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything an exporter may show, taken together: swapped as a whole, never changed."""

    identity: RunIdentity
    up: bool = True
    """False once a fault inside memtrace switched it off."""
    state: RunState = RunState.RUNNING
    """Whether the run is over, and how it ended: then everything is as of its end."""
    begun_unix_seconds: float | None = None
    """When the tracer was attached, seconds since 1970; None before."""
    totals: Totals = field(default_factory=Totals)
    latest: StepRecord | None = None
    latest_traced: StepRecord | None = None
    device_memory: DeviceReading | None = None
    """The newest reading of the device, which may be newer than the one in `latest`."""
    limit_bytes: int | None = None
    """What the run may use of the device: `device_limit_bytes`, else the device's total."""
    risk: RiskReading | None = None
    """What was forecast after the latest step; None before the first one."""
    not_seen: tuple[Unseen, ...] = ()
    """What of the run memtrace cannot see."""
    plan: Mapping[Moment, Breakdown] = field(default_factory=dict)
    """The plan the run was given, to be shown beside what was measured."""

    @property
    def device(self) -> DeviceReading | None:
        """The newest reading of the device; None before the first one."""
        if self.device_memory is not None or self.latest is None:
            return self.device_memory
        return self.latest.device_memory

    @property
    def device_limit_bytes(self) -> int | None:
        """What the run may use of the device: the limit that was set, else all that the device has."""
        if self.limit_bytes is not None or self.device is None:
            return self.limit_bytes
        return self.device.total_bytes

    @property
    def overhead_ratio(self) -> float | None:
        """Share of the wall time since the tracer was attached that memtrace has cost; None before the first step."""
        if self.latest is None or self.begun_unix_seconds is None:
            return None
        passed = self.latest.unix_seconds - self.begun_unix_seconds
        return (self.totals.self_seconds + self.totals.slowed_seconds) / passed if passed > 0 else None

    @property
    def headroom_bytes(self) -> int | None:
        """What the run can still allocate by the newest readings: see `headroom_bytes`."""
        allocator = None if self.latest is None else self.latest.allocator
        return headroom_bytes(self.identity.device, self.limit_bytes, self.device, allocator)

    def newest_breakdown(self, moment: Moment) -> Breakdown | None:
        """Returns what is known of a moment now; None before any step had it.

        That is the breakdown of the newest step that has the moment. An estimated one lacks what only a trace can
        see; those categories are carried over from the last traced step, so that they do not come and go.
        """
        latest = None if self.latest is None else self.latest.moments.get(moment)
        traced = None if self.latest_traced is None else self.latest_traced.moments.get(moment)
        if latest is None or traced is None or not latest.estimated:
            return traced if latest is None else latest
        known = PERSISTENT | {key.category for key in latest.entries}
        carried = {key: size for key, size in traced.entries.items() if key.category not in known}
        return replace(latest, entries=ordered_entries({**latest.entries, **carried}))


def headroom_bytes(
    device: str, limit_bytes: int | None, reading: DeviceReading | None, allocator: AllocatorReading | None
) -> int | None:
    """Returns what a run can still allocate: free memory plus allocator slack, within the limits; None if not known.

    The limits are `limit_bytes` and what the allocator may reserve. Below 0 when the run is over one. Memory cannot be
    given to a tensor in one piece when it is fragmented: this is an upper bound.

    Args:
        device: what the run trains on, as torch prints it.
        limit_bytes: what the run may use of it; None means all.
        reading: what the driver says.
        allocator: what the allocator says.
    """
    if reading is None:
        return None
    if device == "cpu":
        held = reading.process_bytes
        limit = None if limit_bytes is None or held is None else limit_bytes - held
        return None if reading.free_bytes is None else _least(reading.free_bytes, limit)
    if allocator is None or reading.free_and_reserved_bytes is None:
        return None
    # What torch can hold in all, by figures that were read together, less what it cannot give to a tensor.
    limit = None if limit_bytes is None else limit_bytes - (reading.non_torch_bytes or 0)
    reach = _least(reading.free_and_reserved_bytes, limit, allocator.allowed_bytes)
    return reach - (allocator.private_pool_bytes or 0) - allocator.allocated_bytes


def _least(first: int, *others: int | None) -> int:
    return min([first, *(bound for bound in others if bound is not None)])

"""Everything that was read at the moment of a failure, and the report that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from memtrace.oom.advice import ModelFacts, Situation, remedies
from memtrace.oom.composition import Holding, bounded, compose
from memtrace.oom.holders import largest_blocks, largest_holders
from memtrace.record.breakdown import AllocatorReading, BatchShape, Breakdown, StepRecord
from memtrace.record.categories import Moment
from memtrace.record.oom.report import FailedRequest, Fragmentation, OomReport
from memtrace.record.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What was read. Plain data: the report is a pure function of it."""

    unix_seconds: float
    request: FailedRequest
    snapshot: Snapshot
    """The tracer's state: which process, the newest reading of the device, the last traced step."""
    holdings: Sequence[Holding]
    """What is live."""
    complete: bool
    """Whether `holdings` has every live block."""
    estimated: bool
    """Whether activations among them were told by counters."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Module for which the storage at an address is kept."""
    facts: ModelFacts = field(default_factory=ModelFacts)
    step: int | None = None
    batch: BatchShape | None = None
    allocator: AllocatorReading | None = None
    fragmentation: Fragmentation | None = None


def describe(scene: Scene) -> OomReport:
    """Returns the report of a scene."""
    snapshot, identity = scene.snapshot, scene.snapshot.identity
    traced: StepRecord | None = snapshot.latest_traced
    device = snapshot.device
    composition = compose(
        scene.holdings,
        allocated_bytes=None if scene.allocator is None else scene.allocator.requested_bytes,
        complete=scene.complete,
        estimated=scene.estimated,
    )
    report = OomReport(
        run_name=identity.run_name,
        run_id=identity.run_id,
        rank=identity.rank,
        world_size=identity.world_size,
        device=identity.device,
        unix_seconds=scene.unix_seconds,
        step=scene.step,
        batch=scene.batch,
        request=scene.request,
        composition=composition,
        holders=largest_holders(scene.holdings, scene.names),
        large_blocks=largest_blocks(scene.holdings, scene.names),
        allocator=scene.allocator,
        fragmentation=scene.fragmentation,
        device_memory=device,
        limit_bytes=snapshot.limit_bytes,
        last_traced_step=None if traced is None else traced.step,
        last_traced_peak=None if traced is None else _peak(traced),
        remedies=(),
    )
    return with_request(report, scene.request, scene.facts)


def with_request(report: OomReport, request: FailedRequest, facts: ModelFacts) -> OomReport:
    """Returns the report with more that is known of the request, and with the remedies that follow from it."""
    device = report.device_memory
    situation = Situation(
        entries=report.composition.entries,
        request=request,
        facts=facts,
        batch=report.batch,
        world_size=report.world_size,
        fragmentation=report.fragmentation,
        other_processes_bytes=None if device is None else device.other_processes_bytes,
        device_free_bytes=None if device is None else device.free_bytes,
    )
    return replace(report, request=request, remedies=remedies(situation))


def _peak(traced: StepRecord) -> Breakdown | None:
    peak = traced.moments.get(Moment.PEAK)
    return peak and replace(peak, entries=bounded(peak.entries))

"""What each metric of the catalogue says of a snapshot: pure functions, one for each metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import memtrace
from memtrace.record import metrics
from memtrace.record.breakdown import AllocatorReading, DeviceReading, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.metric import Metric
from memtrace.record.metrics import EXPORTED_MOMENTS
from memtrace.record.risk_reading import PeakForecast, RiskReading
from memtrace.record.snapshot import RunState, Snapshot

MAX_NOT_SEEN = 2
"""Series of `memtrace_not_seen` at most, the newest ones; fewer where every category is planned and held at every
moment. The log has all."""

OTHER = "other"
"""Component under which the smallest entries of a category are added up when there are too many."""

MAX_ENTRY_SERIES = 35
"""Series of `memtrace_memory_bytes`, all moments together, of `memtrace_plan_bytes` and `memtrace_not_seen`: what
`MAX_SERIES` leaves."""

MAX_PLAN_SERIES = len(Category) - 1
"""Series of `memtrace_plan_bytes`: one for each category at most but `unattributed`, which nobody plans. What a plan
does not need of them, or a run without one, is for what was measured."""

Labels = dict[str, str]
Sample = tuple[Labels, float | None]
"""Labels besides those of every series, and the value; None where it is not known."""
Reader = Callable[[Snapshot], Iterable[Sample]]


def fold(sizes: Mapping[tuple[Moment, EntryKey], int], limit: int) -> dict[tuple[Moment, EntryKey], int]:
    """Returns at most `limit` entries with the same sum for each moment and category.

    The largest entries stay; the others of a category are added up under component `other`, without a dtype.

    Args:
        sizes: bytes by moment and entry.
        limit: at least the number of moments times the number of categories.
    """
    if len(sizes) <= limit:
        return dict(sizes)
    groups = {(moment, key.category) for moment, key in sizes}
    smallest = sorted(sizes, key=lambda at: (-sizes[at], at))[limit - len(groups) :]
    in_group = Counter((moment, key.category) for moment, key in smallest)
    renamed = {(moment, key) for moment, key in smallest if in_group[moment, key.category] > 1}
    folded: dict[tuple[Moment, EntryKey], int] = {}
    for (moment, key), size in sizes.items():
        at = (moment, EntryKey(key.category, OTHER, "") if (moment, key) in renamed else key)
        folded[at] = folded.get(at, 0) + size
    return folded


def _one(value: Callable[[Snapshot], float | None]) -> Reader:
    """Returns the reader of a metric that has no labels of its own."""
    return lambda snapshot: [({}, value(snapshot))]


def _current(value: Callable[[Snapshot], float | None]) -> Reader:
    """The same for a value that is no longer known once memtrace is off."""
    return lambda snapshot: [({}, value(snapshot))] if snapshot.up else []


def _allocator(value: Callable[[AllocatorReading], float | None]) -> Reader:
    def read(snapshot: Snapshot) -> float | None:
        reading = None if snapshot.latest is None else snapshot.latest.allocator
        return None if reading is None else value(reading)

    return _current(read)


def _device(value: Callable[[DeviceReading], float | None]) -> Reader:
    return _current(lambda snapshot: None if snapshot.device is None else value(snapshot.device))


def _ended(record: StepRecord | None) -> float | None:
    return None if record is None else record.unix_seconds


def _run_info(snapshot: Snapshot) -> Iterator[Sample]:
    run = snapshot.identity
    labels = {"run": run.run_name, "run_id": run.run_id, "device": run.device}
    yield labels | {"local_rank": str(run.local_rank), "world_size": str(run.world_size)}, 1


def _run_state(snapshot: Snapshot) -> Iterator[Sample]:
    yield {"run": snapshot.identity.run_name, "run_id": snapshot.identity.run_id, "state": snapshot.state}, 1


def _memory(snapshot: Snapshot) -> Iterator[Sample]:
    others = sum(1 for read in (_plan, _not_seen) for _ in read(snapshot))
    for (moment, key), size in fold(_held(snapshot), MAX_ENTRY_SERIES - others).items():
        yield _entry_labels(moment, key), size


def _held(snapshot: Snapshot) -> dict[tuple[Moment, EntryKey], int]:
    """Returns the bytes of the newest breakdown of each moment that has series; none once memtrace is off."""
    found = {moment: snapshot.newest_breakdown(moment) for moment in EXPORTED_MOMENTS if snapshot.up}
    return {
        (moment, key): size
        for moment, breakdown in found.items()
        if breakdown is not None
        for key, size in breakdown.entries.items()
    }


def _entry_labels(moment: Moment, key: EntryKey) -> Labels:
    return {"category": key.category, "component": key.component, "dtype": key.dtype, "moment": moment}


def _estimated(snapshot: Snapshot) -> Iterator[Sample]:
    for moment in EXPORTED_MOMENTS:
        breakdown = snapshot.newest_breakdown(moment) if snapshot.up else None
        if breakdown is not None:
            yield {"moment": moment}, breakdown.estimated


def _step_peak(snapshot: Snapshot) -> float | None:
    peak = snapshot.newest_breakdown(Moment.PEAK)
    return None if peak is None else peak.held_bytes


def _step_peak_estimated(snapshot: Snapshot) -> float | None:
    peak = snapshot.newest_breakdown(Moment.PEAK)
    if peak is None or snapshot.latest is None:
        return None
    in_part = snapshot.latest.traced_from_micro_batch is not None
    return in_part or (peak.estimated and peak.allocated_bytes is None)


def _step_peak_tokens(snapshot: Snapshot) -> float | None:
    for record in (snapshot.latest, snapshot.latest_traced):
        if record is not None and Moment.PEAK in record.moments:
            return None if record.batch is None else record.batch.largest_micro_batch_tokens
    return None


def _risk(value: Callable[[RiskReading], float | None]) -> Reader:
    return _current(lambda snapshot: None if snapshot.risk is None else value(snapshot.risk))


def _forecast(value: Callable[[PeakForecast], float]) -> Reader:
    return _risk(lambda risk: None if risk.peak is None else value(risk.peak))


def _growth(snapshot: Snapshot) -> Iterator[Sample]:
    growth = None if snapshot.risk is None or not snapshot.up else snapshot.risk.growth
    if growth is not None:
        yield {"category": growth.category}, growth.bytes_per_step


def _not_seen(snapshot: Snapshot) -> Iterator[Sample]:
    needed = len({(moment, key.category) for moment, key in _held(snapshot)}) + sum(1 for _ in _plan(snapshot))
    room = min(MAX_NOT_SEEN, MAX_ENTRY_SERIES - needed)
    for unseen in snapshot.not_seen[-room:] if room > 0 else ():
        yield {"what": unseen.value}, 1


def _plan(snapshot: Snapshot) -> Iterator[Sample]:
    peak = snapshot.plan.get(Moment.PEAK)
    entries = {} if peak is None else peak.entries
    sizes = {(Moment.PEAK, key): size for key, size in entries.items() if key.category is not Category.UNATTRIBUTED}
    for (moment, key), size in fold(sizes, MAX_PLAN_SERIES).items():
        yield _entry_labels(moment, key), size


READERS: Mapping[Metric, Reader] = MappingProxyType(
    {
        metrics.UP: _one(lambda snapshot: snapshot.up and snapshot.state is RunState.RUNNING),
        metrics.RUN_STATE: _run_state,
        metrics.RUN_START: _one(lambda snapshot: snapshot.begun_unix_seconds),
        metrics.NOT_SEEN: _not_seen,
        metrics.BUILD_INFO: lambda snapshot: [({"version": memtrace.__version__}, 1)],
        metrics.RUN_INFO: _run_info,
        metrics.WORLD_SIZE: _one(lambda snapshot: snapshot.identity.world_size),
        metrics.STEPS: _one(lambda snapshot: snapshot.totals.steps),
        metrics.TRACED_STEPS: _one(lambda snapshot: snapshot.totals.traced_steps),
        metrics.SELF_SECONDS: _one(lambda snapshot: snapshot.totals.self_seconds),
        metrics.SLOWED_SECONDS: _one(lambda snapshot: snapshot.totals.slowed_seconds),
        metrics.OVERHEAD: _one(lambda snapshot: snapshot.overhead_ratio),
        metrics.RETRIES: _one(lambda snapshot: snapshot.totals.retries),
        metrics.OOMS: _one(lambda snapshot: snapshot.totals.ooms),
        metrics.PEAK_RESETS: _one(lambda snapshot: snapshot.totals.peak_counter_resets),
        metrics.LAST_STEP: _one(lambda snapshot: _ended(snapshot.latest)),
        metrics.LAST_TRACED_STEP: _one(lambda snapshot: _ended(snapshot.latest_traced)),
        metrics.MEMORY: _memory,
        metrics.ESTIMATED: _estimated,
        metrics.STEP_PEAK: _current(_step_peak),
        metrics.RUN_PEAK: _one(lambda snapshot: snapshot.totals.highest_peak_bytes),
        metrics.STEP_PEAK_ESTIMATED: _current(_step_peak_estimated),
        metrics.STEP_PEAK_TOKENS: _current(_step_peak_tokens),
        metrics.PREDICTED_PEAK: _forecast(lambda peak: peak.predicted_bytes),
        metrics.PREDICTED_PEAK_BAND: _forecast(lambda peak: peak.band_bytes),
        metrics.PREDICTED_TOKENS: _forecast(lambda peak: peak.batch.tokens),
        metrics.CAPACITY: _risk(lambda risk: risk.capacity_bytes),
        metrics.OOM_RISK: _risk(lambda risk: risk.oom_risk_ratio),
        metrics.GROWTH: _growth,
        metrics.TIME_TO_LIMIT: _risk(lambda risk: None if risk.growth is None else risk.growth.seconds_to_limit),
        metrics.PLAN: _plan,
        metrics.ALLOCATED: _allocator(lambda reading: reading.allocated_bytes),
        metrics.ALLOCATOR_PEAK: _allocator(lambda reading: reading.peak_allocated_bytes),
        metrics.RESERVED: _allocator(lambda reading: reading.reserved_bytes),
        metrics.SLACK: _allocator(lambda reading: reading.slack_bytes),
        metrics.PRIVATE_POOL: _allocator(lambda reading: reading.private_pool_bytes),
        metrics.NON_TORCH: _device(lambda reading: reading.non_torch_bytes),
        metrics.DEVICE_TOTAL: _device(lambda reading: reading.total_bytes),
        metrics.DEVICE_USED: _device(lambda reading: reading.used_bytes),
        metrics.DEVICE_FREE: _device(lambda reading: reading.free_bytes),
        metrics.DEVICE_PROCESS: _device(lambda reading: reading.process_bytes),
        metrics.DEVICE_OTHERS: _device(lambda reading: reading.other_processes_bytes),
        metrics.DEVICE_LIMIT: _one(lambda snapshot: snapshot.device_limit_bytes),
        metrics.HEADROOM: _current(lambda snapshot: snapshot.headroom_bytes),
        metrics.DEVICE_UTILIZATION: _device(lambda reading: reading.utilization_ratio),
        metrics.DEVICE_POWER: _device(lambda reading: reading.power_watts),
        metrics.DEVICE_TEMPERATURE: _device(lambda reading: reading.temperature_celsius),
    }
)
"""How each metric of the catalogue is read from a snapshot."""

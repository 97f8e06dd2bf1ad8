"""Records and snapshots for tests: one of each by hand, and hypothesis strategies for all there can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from memtrace.record.breakdown import (
    AllocatorReading,
    BatchShape,
    Breakdown,
    DeviceReading,
    EntryKey,
    StepRecord,
    ordered_entries,
)
from memtrace.record.categories import Category, Moment
from memtrace.record.limitations import Unseen
from memtrace.record.risk_reading import GrowthForecast, LargestBatch, PeakForecast, RiskReading, ShapeSource
from memtrace.record.snapshot import RunIdentity, Snapshot, Totals

GIB = 2**30

STEP_END_ENTRIES = {
    EntryKey(Category.WEIGHTS, "trainable", "bfloat16"): 2 * GIB,
    EntryKey(Category.MASTER_WEIGHTS, "", "float32"): 4 * GIB,
    EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): 4 * GIB,
    EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"): 4 * GIB,
}
PEAK_ENTRIES = STEP_END_ENTRIES | {
    EntryKey(Category.GRADIENTS, "", "bfloat16"): GIB,
    EntryKey(Category.ACTIVATIONS, "", "bfloat16"): 3 * GIB,
    EntryKey(Category.INPUTS, "", "int64"): 4096,
    EntryKey(Category.TEMPORARIES, "backward", ""): GIB // 2,
}


def breakdown(moment: Moment, entries: dict[EntryKey, int], **fields: Any) -> Breakdown:
    """Returns a breakdown of these entries, whose sum the allocator confirms."""
    return Breakdown(
        moment=moment,
        entries=ordered_entries(entries),
        **({"allocated_bytes": sum(entries.values())} | fields),
    )


def traced_step(**fields: Any) -> StepRecord:
    """Returns a traced step on a GPU, in which everything is known."""
    known: dict[str, Any] = {
        "step": 12,
        "rank": 1,
        "device": "cuda:1",
        "traced": True,
        "unix_seconds": 1700000000.5,
        "self_seconds": 0.0004,
        "step_seconds": 0.33,
        "batch": BatchShape(shape=(8, 512), tokens=4096, largest_micro_batch_tokens=4096),
        "moments": {
            Moment.STEP_END: breakdown(Moment.STEP_END, STEP_END_ENTRIES),
            Moment.PEAK: breakdown(Moment.PEAK, PEAK_ENTRIES),
        },
        "allocator": AllocatorReading(allocated_bytes=14 * GIB, reserved_bytes=20 * GIB, retries=0, ooms=0),
        "device_memory": DeviceReading(
            name="NVIDIA H100",
            uuid="GPU-1234",
            total_bytes=80 * GIB,
            used_bytes=24 * GIB,
            free_bytes=56 * GIB,
            process_bytes=21 * GIB,
            other_processes_bytes=3 * GIB,
            non_torch_bytes=GIB,
            free_and_reserved_bytes=76 * GIB,
            utilization_ratio=0.75,
            power_watts=350.5,
            temperature_celsius=61.0,
        ),
    }
    return StepRecord(**(known | fields))


def counted_step(**fields: Any) -> StepRecord:
    """Returns a counted step on a GPU: the ledger at the end of the step, and nothing that only a trace can see."""
    entries = {EntryKey(Category.WEIGHTS, "trainable", "bfloat16"): 2 * GIB}
    moments = {Moment.STEP_END: breakdown(Moment.STEP_END, entries, estimated=True)}
    return traced_step(**({"step": 13, "traced": False, "moments": moments} | fields))


def gpu_snapshot(record: StepRecord | None = None, **fields: Any) -> Snapshot:
    """Returns the snapshot of a rank on a GPU after one step."""
    latest = record or traced_step()
    known: dict[str, Any] = {
        "identity": RunIdentity(
            run_name="llama", rank=1, local_rank=1, world_size=2, device="cuda:1", gpu_uuid="GPU-1234"
        ),
        "totals": Totals(steps=12, traced_steps=1, self_seconds=0.5, slowed_seconds=0.25, ooms=0, retries=2),
        "begun_unix_seconds": latest.unix_seconds - 100,
        "latest": latest,
        "latest_traced": latest if latest.traced else None,
        "device_memory": latest.device_memory,
    }
    return Snapshot(**(known | fields))


def full_snapshot() -> Snapshot:
    """Returns a snapshot in which there is something to say about every metric."""
    entries = {EntryKey(category, "", ""): GIB for category in Category}
    plan = {Moment.PEAK: breakdown(Moment.PEAK, entries)}
    forecast = PeakForecast(
        predicted_bytes=30 * GIB,
        band_bytes=GIB,
        batch=LargestBatch(tokens=8192, source=ShapeSource.SETTING),
        points=3,
        quadratic=False,
        category=Category.ACTIVATIONS,
    )
    growth = GrowthForecast(
        category=Category.UNATTRIBUTED, bytes_per_step=1024.0, steps_to_limit=5000, seconds_to_limit=1650.0
    )
    step = traced_step()
    assert step.allocator is not None
    latest = replace(step, allocator=replace(step.allocator, peak_allocated_bytes=18 * GIB, private_pool_bytes=0))
    risk = RiskReading(step=12, capacity_bytes=76 * GIB, peak=forecast, growth=growth, oom_risk_ratio=0.25)
    totals = Totals(steps=12, traced_steps=1, retries=2, highest_peak_bytes=20 * GIB)
    known = {"totals": totals, "plan": plan, "risk": risk, "not_seen": (Unseen.FORWARD,)}
    return gpu_snapshot(latest, limit_bytes=60 * GIB, **known)


def cpu_snapshot(**fields: Any) -> Snapshot:
    """Returns the snapshot of a run on a CPU before its first step."""
    reading = DeviceReading(
        name="cpu", total_bytes=64 * GIB, used_bytes=8 * GIB, free_bytes=56 * GIB, process_bytes=GIB
    )
    return Snapshot(**({"identity": RunIdentity(run_name="cpu run"), "device_memory": reading} | fields))


sizes = st.integers(0, 2**63 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
seconds = st.floats(0, 1e12, allow_nan=False)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Returns a strategy for values that may not be known."""
    return st.none() | strategy


entry_keys = st.builds(EntryKey, st.sampled_from(Category), words, words)
batches = st.builds(
    BatchShape,
    shape=st.lists(sizes, max_size=4).map(tuple),
    tokens=sizes,
    largest_micro_batch_tokens=sizes,
)
allocators = st.builds(
    AllocatorReading,
    allocated_bytes=sizes,
    reserved_bytes=sizes,
    requested_bytes=maybe(sizes),
    peak_allocated_bytes=maybe(sizes),
    inactive_split_bytes=maybe(sizes),
    retries=maybe(sizes),
    ooms=maybe(sizes),
)
devices = st.builds(
    DeviceReading,
    name=maybe(words),
    uuid=maybe(words),
    total_bytes=maybe(sizes),
    used_bytes=maybe(sizes),
    free_bytes=maybe(sizes),
    driver_reserved_bytes=maybe(sizes),
    process_bytes=maybe(sizes),
    other_processes_bytes=maybe(sizes),
    utilization_ratio=maybe(seconds),
    power_watts=maybe(seconds),
    temperature_celsius=maybe(seconds),
)


@st.composite
def breakdowns(draw: st.DrawFn, moment: Moment) -> Breakdown:
    """Draws a breakdown of one moment, with up to 15 entries."""
    return Breakdown(
        moment=moment,
        entries=ordered_entries(draw(st.dictionaries(entry_keys, sizes, max_size=15))),
        allocated_bytes=draw(maybe(sizes)),
        estimated=draw(st.booleans()),
    )


moments = st.sets(st.sampled_from(Moment)).flatmap(
    lambda chosen: st.fixed_dictionaries({moment: breakdowns(moment) for moment in chosen})
)
steps = st.builds(
    StepRecord,
    step=sizes,
    rank=sizes,
    device=words,
    traced=st.booleans(),
    unix_seconds=seconds,
    self_seconds=seconds,
    step_seconds=maybe(seconds),
    batch=maybe(batches),
    moments=moments,
    host=st.dictionaries(entry_keys, sizes, max_size=6).map(ordered_entries),
    allocator=maybe(allocators),
    device_memory=maybe(devices),
)

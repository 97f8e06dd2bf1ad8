"""Histories as CUDA's allocator would have recorded them, of simulated runs whose breakdown is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from memtrace.allocator.caching_allocator import CachingAllocator
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.planning.optimizers.simulated import make_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import step_kernels
from memtrace.planning.simulated_run import SimulatedRun, Training, run_two_steps
from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import Moment
from memtrace.simulation.kernels import Target
from tests.forensics.snapshots import BASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run, and what a snapshot of it says."""

    run: SimulatedRun
    snapshot: dict[str, Any]

    @property
    def peak(self) -> Breakdown:
        return self.run.moments[Moment.PEAK]


def record(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    loss: Callable[..., Any],
    *,
    recipe: str,
    optimizer: str = "adamw",
    accumulation_steps: int = 1,
) -> Recorded:
    """Two steps from before the model was made on, on a device that is not there."""
    sharding = Sharding()
    run = run_two_steps(
        Training(
            make_model=make_model,
            make_batch=make_batch,
            loss=loss,
            recipe=find_recipe(recipe),
            make_optimizer=make_optimizer(optimizer, step_kernels(Target.CUDA, sharding)),
            accumulation_steps=accumulation_steps,
            target=Target.CUDA,
            sharding=sharding,
        )
    )
    return Recorded(run=run, snapshot=snapshot_of(run))


BEGIN_US = 1_795_820_593_000_000
"""When the history of a snapshot with a step log begins, microseconds since 1970."""


def with_times(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The same snapshot, with times since 1970."""
    (trace,) = snapshot["device_traces"]
    return {**snapshot, "device_traces": [[{**entry, "time_us": entry["time_us"] + BEGIN_US} for entry in trace]]}


def write_step_log(run: SimulatedRun, directory: Path, **changed: Any) -> StepRecord:
    """Writes the second step as the tracer would have recorded it; returns the record."""
    begin, end = (run.timeline.position(at) for at in (run.marks.begin_ns, run.marks.end_ns))
    record = StepRecord(
        step=2,
        rank=0,
        device="cuda:0",
        traced=True,
        unix_seconds=(BEGIN_US + end) / 1e6,
        self_seconds=0.0,
        step_seconds=(end - begin) / 1e6,
        moments=run.moments,
    )
    record = replace(record, **changed)
    with StepLog(step_log_path(directory, record.rank)) as log:
        log.write(record)
    return record


def failing(snapshot: dict[str, Any], requested: int = 1 << 30) -> dict[str, Any]:
    """The same history, after which another block is made and a request fails."""
    (trace,), (segment,) = snapshot["device_traces"], snapshot["segments"]
    made = {"action": "alloc", "addr": 1 << 50, "size": 5000, "stream": 0, "time_us": trace[-1]["time_us"] + 1}
    failed = {"action": "oom", "size": requested, "stream": 0, "device_free": 1 << 20, "time_us": made["time_us"] + 1}
    block = {"address": 1 << 50, "size": 5120, "requested_size": 5000, "state": "active_allocated"}
    return {
        "segments": [{**segment, "blocks": [*segment["blocks"], block]}],
        "device_traces": [[*trace, made, failed]],
    }


def snapshot_of(run: SimulatedRun, first: int = 0) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would have returned; without the first entries, as a ring loses them."""
    allocator, live, trace, reserved = CachingAllocator(), {}, [], 0
    for time_us, event in enumerate(run.events(), 1):
        if event.delta > 0:
            allocator.allocate(event.address, event.delta)
            addresses = allocator.address_range(event.address)
            live[event.address] = BASE + addresses.start, event.delta, len(addresses)
            address, size, _ = live[event.address]
        else:
            allocator.free(event.address)
            address, size, _ = live.pop(event.address)
        entry = {"addr": address, "size": size, "stream": 0, "time_us": time_us}
        if allocator.reserved_bytes != reserved:
            grown = {"action": "segment_alloc", "size": allocator.reserved_bytes - reserved}
            trace.append({**entry, **grown})
            reserved = allocator.reserved_bytes
        kinds = ("alloc",) if event.delta > 0 else ("free_requested", "free_completed")
        trace += [{**entry, "action": kind} for kind in kinds]
    blocks = [
        {"address": address, "size": taken, "requested_size": size, "state": "active_allocated"}
        for address, size, taken in sorted(live.values())
    ]
    segment = {"device": 0, "address": BASE, "total_size": reserved, "stream": 0, "blocks": blocks}
    return {"segments": [segment], "device_traces": [trace[first:]]}

"""Histories as CUDA's allocator would have recorded them, of simulated runs whose breakdown is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from memtrace.allocator.caching_allocator import CachingAllocator
from memtrace.planning.optimizers.simulated import make_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import step_kernels
from memtrace.planning.simulated_run import SimulatedRun, Training, run_two_steps
from memtrace.record.breakdown import Breakdown
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

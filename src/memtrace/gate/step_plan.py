"""Plans one step so that the same bytes come out each time: what a case and an assertion in a test share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from memtrace.allocator.caching_allocator import CachingAllocator, replay
from memtrace.errors import PlanError
from memtrace.gate.result import CaseResult
from memtrace.planning.by_module import holdings
from memtrace.planning.hardware import Device, find_device
from memtrace.planning.optimizers.simulated import make_optimizer
from memtrace.planning.optimizers.updates import MakeOptimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import model_loss, step_kernels, workspaces_of
from memtrace.planning.simulated_run import Loss, SimulatedRun, Training, run_two_steps
from memtrace.simulation.kernels import Target


def on_device(name: str) -> tuple[Target, Device | None]:
    """Returns whose kernels `cuda`, `cpu` or the name of a GPU stands for, and the GPU where one is named.

    Raises:
        PlanError: there is no such device.
    """
    if name in tuple(Target):
        return Target(name), None
    return Target.CUDA, find_device(name)


def training_with(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    *,
    recipe: str,
    optimizer: str | MakeOptimizer = "adamw",
    loss: Loss | None = None,
    accumulation_steps: int = 1,
    sharding: Sharding | None = None,
    device: str = "cuda",
    keep_outputs: bool = False,
) -> Training:
    """Returns what is simulated for the arguments of `memtrace.plan`.

    Raises:
        PlanError: one has no meaning.
    """
    if accumulation_steps < 1:
        raise PlanError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
    target, named = on_device(device)
    sharding = sharding or Sharding()
    if isinstance(optimizer, str):
        optimizer = make_optimizer(optimizer, step_kernels(target, sharding))
    return Training(
        make_model=make_model,
        make_batch=make_batch,
        loss=loss or model_loss,
        recipe=find_recipe(recipe),
        make_optimizer=optimizer,
        accumulation_steps=accumulation_steps,
        keeps_outputs=keep_outputs,
        target=target,
        sharding=sharding,
        workspaces=workspaces_of(named),
    )


def planned(training: Training) -> CaseResult:
    """Returns the bytes of the second of two steps: the same ones whatever the process did before.

    Raises:
        PlanError: the model cannot be made, refuses the batch, or does what cannot be simulated.
    """
    run = _collected(training)
    by_moment = holdings(run.timeline, run.marks, run.spans, run.owners)
    for moment, breakdown in run.moments.items():
        added = {key: sum(sizes.values()) for key, sizes in by_moment[moment].items()}
        assert added == dict(breakdown.entries), "modules add up to the breakdown"
    reserved = None
    if training.target is Target.CUDA:
        allocator = CachingAllocator()
        replay(run.events(), allocator)
        reserved = allocator.peak_reserved_bytes
    return CaseResult(
        modules={
            moment: {" ".join(filter(None, key)): sizes for key, sizes in held.items()}
            for moment, held in by_moment.items()
        },
        reserved_bytes=reserved,
        host_bytes=run.host_bytes,
    )


def _collected(training: Training) -> SimulatedRun:
    """Runs two steps in which reference cycles are collected at the beginning of each micro batch and at no other time.

    Python would look for them after a number of objects that depends on what the process did before.
    """

    def make_batch() -> Any:
        gc.collect()
        return training.make_batch()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        return run_two_steps(replace(training, make_batch=make_batch))
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

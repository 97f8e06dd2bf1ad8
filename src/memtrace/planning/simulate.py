"""A plan from a model's own code: two steps on tensors without memory, seen as the live tracer sees a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memtrace.categories import Moment
from memtrace.errors import PlanError
from memtrace.planning.caching_allocator import CachingAllocator, replay
from memtrace.planning.plan import ByteRange, Plan
from memtrace.planning.recipe import Recipe, find_recipe
from memtrace.planning.sharding import Sharding, Strategy
from memtrace.planning.sharding_assumptions import sharding_assumptions
from memtrace.planning.simulated_run import Loss, SimulatedRun, Training, run_two_steps
from memtrace.planning.torch_optimizers import StepKernels, make_optimizer, steps_fused
from memtrace.planning.updates import MakeOptimizer
from memtrace.sources.kernels import CUBLAS_WORKSPACES, Target

_CUSTOM = "custom"
"""What an optimizer is called that a function makes."""


def plan(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    *,
    recipe: str = "fp32",
    optimizer: str | MakeOptimizer = "adamw",
    loss: Loss | None = None,
    accumulation_steps: int = 1,
    sharding: Sharding | None = None,
    device: str = "cuda",
) -> Plan:
    """Returns what a training step of this model will need, without a GPU and without its memory.

    Runs two steps of the real model code on tensors without memory, and looks at the second one.

    Args:
        make_model: returns the module to train; it is called with the meta device as the default, so that a model of
            any size can be made. Gradient checkpointing and frozen parameters are as it leaves them; parameters are
            converted to the types of the recipe.
        make_batch: returns one micro batch, for instance a dict of tensors on the CPU. Integers count by value (a mask
            with padding takes another way through a model than one without), others by shape alone.
        recipe: precision of weights, master copies and products, by name; see `memtrace.planning.recipe`.
        optimizer: by name, see `memtrace.planning.optimizers`, or a function that makes one for a list of parameters.
        loss: returns the loss for (model, batch). By default the batch is passed to the model, by name where it is a
            mapping, and the loss is what the model returns as `loss`.
        accumulation_steps: micro batches for each optimizer step.
        sharding: a `memtrace.planning.sharding.Sharding`: DDP, FSDP2 or DeepSpeed's ZeRO, and the rank that is
            planned. FSDP2 itself is run, on ranks that are not there; DDP and ZeRO are modelled.
        device: `cuda` or `cpu`: whose kernels and whose allocator.

    Raises:
        PlanError: the model cannot be made, refuses the batch, or does what cannot be simulated.
    """
    if device not in tuple(Target):
        raise PlanError(f"device must be one of {', '.join(Target)}, got {device!r}")
    if accumulation_steps < 1:
        raise PlanError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
    target, found = Target(device), find_recipe(recipe)
    sharding = sharding or Sharding()
    if isinstance(optimizer, str):
        name, make = optimizer, make_optimizer(optimizer, step_kernels(target, sharding))
    else:
        name, make = _CUSTOM, optimizer
    run = run_two_steps(
        Training(
            make_model=make_model,
            make_batch=make_batch,
            loss=loss or model_loss,
            recipe=found,
            make_optimizer=make,
            accumulation_steps=accumulation_steps,
            target=target,
            sharding=sharding,
        )
    )
    return plan_of(run, found, name, target, sharding)


def step_kernels(target: Target, sharding: Sharding) -> StepKernels:
    """Returns how an optimizer goes through the parameters unless it is told: DeepSpeed brings a fused step."""
    if target is Target.CPU:
        return StepKernels.LOOP
    return StepKernels.FUSED if sharding.is_zero else StepKernels.FOREACH


def plan_of(
    run: SimulatedRun,
    recipe: Recipe,
    optimizer: str,
    target: Target,
    sharding: Sharding | None = None,
    *,
    kernels: StepKernels | None = None,
) -> Plan:
    """Returns the plan that a simulated run makes.

    Args:
        run: what happened.
        recipe: of the run.
        optimizer: its name.
        target: of the run.
        sharding: of the run.
        kernels: how the optimizer went through the parameters, where it was told; by default as `step_kernels` says.
    """
    sharding = sharding or Sharding()
    fused = steps_fused(optimizer, kernels or step_kernels(target, sharding))
    peak = run.moments[Moment.PEAK].total_bytes
    setup: dict[str, str | int | float] = {"parameters": run.parameters, "trainable_parameters": run.trainable}
    if run.batch is not None:
        setup["batch"] = " x ".join(str(size) for size in run.batch.shape)
        setup["tokens"] = run.batch.tokens
    if sharding.strategy is not Strategy.NONE:
        setup |= {"strategy": sharding.strategy.value, "world_size": sharding.world_size, "rank": sharding.rank}
    allocator = CachingAllocator() if target is Target.CUDA else None
    if allocator is not None:
        replay(run.events(), allocator)
    return Plan(
        recipe=recipe.name,
        optimizer=optimizer,
        setup=setup,
        moments=run.moments,
        assumptions=(*_assumptions(recipe, target, optimizer, fused=fused), *sharding_assumptions(sharding)),
        allocated=ByteRange(low=peak, high=peak if allocator is None else max(peak, allocator.peak_allocated_bytes)),
        reserved_bytes=None if allocator is None else allocator.peak_reserved_bytes,
    )


def model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Returns the loss that the model computes for the batch itself.

    Raises:
        PlanError: it returns none.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (list, tuple)) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise PlanError(
            f"{type(model).__name__} returned no loss: give the batch labels, or pass loss=, a function of (model, "
            "batch)"
        )
    return loss


def _assumptions(recipe: Recipe, target: Target, optimizer: str, *, fused: bool) -> Iterator[str]:
    yield f"Recipe {recipe.name}: {recipe.summary}."
    yield "Two steps of the model's own code were run on tensors without memory; the figures are of the second."
    if target is Target.CPU:
        yield "Scratch memory inside the kernels of a CPU is not counted."
        return
    if fused:
        yield "The optimizer's step is fused, as DeepSpeed's own and Trainer's default are: it has no temporaries."
    elif optimizer == _CUSTOM:
        yield "The optimizer is the given one, and its step is run as it is."
    else:
        yield (
            "The optimizer's step works on lists of parameters (foreach), torch's default on a GPU; Trainer's default, "
            "a fused step where there is one, has no temporaries: --fused-optimizer plans it."
        )
    yield (
        "Attention is flash or memory-efficient attention where torch would choose it; scratch of convolutions and of "
        "the backward pass of embeddings is not counted."
    )
    yield f"cuBLAS keeps {sum(CUBLAS_WORKSPACES):,} bytes of workspaces (on Hopper 64 MiB), shown as unattributed."

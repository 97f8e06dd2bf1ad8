"""A plan from a model's own code: two steps on tensors without memory, seen as the live tracer sees a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memtrace.allocator.caching_allocator import CachingAllocator, replay
from memtrace.errors import PlanError
from memtrace.planning.further import FurtherModel, further_setup, further_sharding
from memtrace.planning.hardware import Device, find_device, held_against
from memtrace.planning.optimizers.simulated import StepKernels, keeps_only, make_optimizer, steps_fused
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.optimizers.updates import MakeOptimizer
from memtrace.planning.recipe import Recipe, find_recipe
from memtrace.planning.sharding.assumptions import sharding_assumptions
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.planning.simulated_run import WORKSPACES, Loss, SimulatedRun, Training, run_two_steps
from memtrace.record.categories import Moment
from memtrace.record.plan import ByteRange, Plan
from memtrace.simulation import kernels
from memtrace.simulation.kernels import Target
from memtrace.sources.cuda import cublas

CONVOLUTION_PEAK, CONVOLUTION_RESERVED = 0.03, 0.10
"""Shares by which a plan without the scratch of convolutions may be too low.

Seen on an H200 with torch 2.11: ViT's peak 1.3 % and its reserved memory 3.3 %, ResNet-50's reserved memory 8.7 %."""

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
    keep_outputs: bool = False,
    further_models: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> Plan:
    """Returns what a training step of this model will need, without a GPU and without its memory.

    Runs two steps of the real model code on tensors without memory, and looks at the second one.

    Args:
        make_model: returns the module to train; it is called with the meta device as the default, so that a model of
            any size can be made. Gradient checkpointing and frozen parameters are as it leaves them; parameters are
            converted to the types of the recipe. Lazy modules get their shapes from a forward pass on a batch.
        make_batch: returns one micro batch, for instance a dict of tensors on the CPU. Integers count by value (a mask
            with padding takes another way through a model than one without), others by shape alone.
        recipe: precision of weights, master copies and products, by name; see `memtrace.planning.recipe`.
        optimizer: by name, see `memtrace.planning.optimizers.states`, or a function that makes one for a list of
            parameters.
        loss: returns the loss for (model, batch). By default the batch is passed to the model, by name where it is a
            mapping, and the loss is what the model returns as `loss`.
        accumulation_steps: micro batches for each optimizer step.
        sharding: a `memtrace.planning.sharding.shares.Sharding`: DDP, FSDP2 or DeepSpeed's ZeRO, and the rank that is
            planned. FSDP2 itself is run, on ranks that are not there; DDP and ZeRO are modelled.
        device: `cuda` or `cpu`: whose kernels and whose allocator. The name of a GPU, such as `H200`, stands for `cuda`
            with what the libraries keep on that one, and adds the verdict whether the step fits it.
        keep_outputs: whether the loop keeps the output of the model into the next step, as `out = model(**batch)` does;
            under Trainer it does not.
        further_models: functions that make the models beside the trained one, by name: a reference, a teacher, a
            frozen encoder. They are called as `make_model` is; the types of their parameters are as they leave them.
            `loss` is given the models by name, as `loss(model, batch, reference=...)`, and runs them as the loop does;
            without `loss` they are held and do not run.

    Raises:
        PlanError: there is no such device; a model cannot be made, refuses the batch, or does what cannot be
            simulated.
    """
    training = training_with(
        make_model,
        make_batch,
        recipe=recipe,
        optimizer=optimizer,
        loss=loss,
        accumulation_steps=accumulation_steps,
        sharding=sharding,
        device=device,
        keep_outputs=keep_outputs,
        further_models=further_models,
    )
    held = [FurtherModel(name=name) for name in training.further]
    run = run_two_steps(training)
    _, named = on_device(device)
    sharding, name = training.sharding, optimizer if isinstance(optimizer, str) else _CUSTOM
    made = plan_of(run, training.recipe, name, training.target, sharding, device=named)
    if held:
        said = (*made.assumptions, *_said_of(held, run), *further_sharding(held, sharding))
        made = replace(made, setup={**made.setup, **further_setup(held)}, assumptions=said)
    return made if named is None else held_against(made, named.name, named.usable_bytes, sharding.world_size)


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
    further_models: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> Training:
    """Returns what is simulated for the arguments of `plan`.

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
        loss=loss or _own_loss,
        further=dict(further_models or {}),
        recipe=find_recipe(recipe),
        make_optimizer=optimizer,
        accumulation_steps=accumulation_steps,
        keeps_outputs=keep_outputs,
        target=target,
        sharding=sharding,
        workspaces=workspaces_of(named),
    )


def _said_of(models: Sequence[FurtherModel], run: SimulatedRun) -> Iterator[str]:
    for model in models:
        runs = "runs where the loss runs it" if model.name in run.further_output_bytes else "does not run"
        yield f"{model.name} is held as its function makes it, and {runs}."


def _own_loss(model: nn.Module, batch: Any, /, **_: nn.Module) -> torch.Tensor:
    """The loss that the model computes, beside further models that do not run."""
    return model_loss(model, batch)


def on_device(device: str) -> tuple[Target, Device | None]:
    """Returns whose kernels `cuda`, `cpu` or the name of a GPU stands for, and the GPU where one is named.

    Raises:
        PlanError: there is no such device.
    """
    if device in tuple(Target):
        return Target(device), None
    try:
        return Target.CUDA, find_device(device)
    except PlanError as error:
        raise PlanError(f"device must be {', '.join(Target)} or the name of a GPU; {error}") from error


def workspaces_of(device: Device | None) -> Sequence[int]:
    """Returns the sizes of what cuBLAS keeps on a device; those of devices before Hopper where none is named."""
    return WORKSPACES if device is None else cublas.of_both_threads(device.workspace_bytes)


def step_kernels(target: Target, sharding: Sharding) -> StepKernels:
    """Returns how an optimizer goes through the parameters unless it is told: DeepSpeed brings a fused step."""
    if target is Target.CPU or (sharding.offload is not Offload.NONE and not sharding.brings_fused_step):
        return StepKernels.LOOP
    return StepKernels.FUSED if sharding.brings_fused_step else StepKernels.FOREACH


def plan_of(
    run: SimulatedRun,
    recipe: Recipe,
    optimizer: str,
    target: Target,
    sharding: Sharding | None = None,
    *,
    step: StepKernels | None = None,
    device: Device | None = None,
) -> Plan:
    """Returns the plan that a simulated run makes.

    Args:
        run: what happened.
        recipe: of the run.
        optimizer: its name.
        target: of the run.
        sharding: of the run.
        step: how the optimizer went through the parameters, where it was told; by default as `step_kernels` says.
        device: whose libraries were simulated, where one was named.
    """
    sharding = sharding or Sharding()
    fused = steps_fused(optimizer, step or step_kernels(target, sharding))
    peak = run.moments[Moment.PEAK].total_bytes
    setup: dict[str, str | int | float] = {"parameters": run.parameters, "trainable_parameters": run.trainable}
    if run.batch is not None:
        setup["batch"] = " x ".join(str(size) for size in run.batch.shape)
        setup["tokens"] = run.batch.tokens
    if sharding.strategy is not Strategy.NONE:
        setup |= {"strategy": sharding.strategy.value, "world_size": sharding.world_size, "rank": sharding.rank}
    if sharding.offload is not Offload.NONE:
        setup["offload"] = sharding.offload.value
    allocator = CachingAllocator() if target is Target.CUDA else None
    if allocator is not None:
        replay(run.events(), allocator)
    high = peak if allocator is None else max(peak, allocator.peak_allocated_bytes)
    convolves = allocator is not None and not run.kinds.isdisjoint(kernels.CONVOLUTIONS)
    return Plan(
        recipe=recipe.name,
        optimizer=optimizer,
        setup=setup,
        moments=run.moments,
        assumptions=(
            *_assumptions(run, recipe, target, optimizer, fused=fused, device=device),
            *sharding_assumptions(sharding, recipe),
        ),
        allocated=ByteRange(low=peak, high=int(high * (1 + CONVOLUTION_PEAK)) if convolves else high),
        reserved_bytes=None if allocator is None else allocator.peak_reserved_bytes,
        reserved_margin=CONVOLUTION_RESERVED if convolves else 0.0,
        host_bytes=run.host_bytes,
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


def _assumptions(
    run: SimulatedRun, recipe: Recipe, target: Target, optimizer: str, *, fused: bool, device: Device | None
) -> Iterator[str]:
    """Yields what a plan rests on, as far as it matters for this one."""
    yield f"Recipe {recipe.name}: {recipe.summary}."
    yield "Two steps of the model's own code were run on tensors without memory; the figures are of the second."
    if target is Target.CPU:
        yield "Scratch memory inside the kernels of a CPU is not counted."
        return
    if fused:
        yield "The optimizer's step is fused, as DeepSpeed's own and Trainer's default are: it has no temporaries."
    elif optimizer != _CUSTOM and keeps_only(optimizer):
        yield "The optimizer's states are made, and its step is not run: its kernels update in place."
        if find_optimizer(optimizer).note:
            yield str(find_optimizer(optimizer).note)
    elif optimizer == _CUSTOM:
        yield "The optimizer is the given one, and its step is run as it is."
    else:
        yield (
            "The optimizer's step works on lists of parameters (foreach), torch's default on a GPU; Trainer's default, "
            "a fused step where there is one, has no temporaries: --fused-optimizer plans it."
        )
    if run.kinds & kernels.FUSED_ATTENTION:
        yield "Attention is flash or memory-efficient attention where torch would choose it."
    if run.kinds & kernels.CONVOLUTIONS:
        yield (
            "Scratch of convolutions is not counted, since cuDNN chooses their algorithms on the device: the peak may "
            f"be {CONVOLUTION_PEAK:.0%} higher, and what is reserved {CONVOLUTION_RESERVED:.0%}."
        )
    if run.kinds & kernels.EMBEDDING_GRADIENTS:
        yield "Scratch of the backward pass of embeddings is not counted."
    sizes = f"{sum(workspaces_of(device)):,}"
    if device is not None:
        yield f"cuBLAS keeps {sizes} bytes of workspaces on a {device.name}."
    else:
        later = sum(cublas.of_both_threads(cublas.FROM_HOPPER))
        yield f"cuBLAS keeps {sizes} bytes of workspaces; {later:,} on Hopper and later: --device says on which."

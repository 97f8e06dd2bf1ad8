"""A plan from a configuration: what is simulated, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from memtrace.errors import PlanError
from memtrace.planning.further import FurtherModel, check_further, further_setup, further_sharding
from memtrace.planning.further_runs import loss_beside, make_further_inputs, makers, said_of
from memtrace.planning.hardware import Device
from memtrace.planning.optimizers.simulated import StepKernels, make_optimizer
from memtrace.planning.recipe import DTYPE_BYTES, Recipe, find_recipe, under_deepspeed
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import model_loss, plan_of, step_kernels, workspaces_of
from memtrace.planning.simulated_run import SimulatedRun, Training, run_two_steps
from memtrace.record.plan import Plan
from memtrace.record.units import GB
from memtrace.simulation.kernels import FLASH, Target
from memtrace.simulation.models.builds import (
    BatchSettings,
    ModelSettings,
    build_model,
    make_batch,
    named_modules,
    usual_positions,
)
from memtrace.simulation.operator_results import OperatorResults

MATTERS = 0.01
"""Share of the peak from which on the form of the loop is worth a sentence."""

DEFAULT_ADAPTER_RANK = 16
"""Rank of the adapters that the LoRA recipes train, where none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRequest:
    """What a simulated plan is made from; `dataclasses.replace` makes the next one."""

    configuration: Any
    """An object of transformers: see `memtrace.simulation.models.configurations`."""
    recipe: Recipe
    optimizer: str = "adamw"
    model: ModelSettings = field(default_factory=ModelSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    accumulation_steps: int = 1
    keeps_outputs: bool = False
    """Whether the loop keeps the output of the model into the next step (`out = model(**batch)`); Trainer does not."""
    fused_step: bool = False
    """Whether torch's fused kernel updates the weights, where the optimizer has one: it needs no temporaries."""
    target: Target = Target.CUDA
    sharding: Sharding = field(default_factory=Sharding)
    further: tuple[FurtherModel, ...] = ()
    """Frozen models beside the trained one: those with a configuration run, of those with a count weights are held."""
    device: Device | None = None
    """The device that the step is planned for, where it is a known one."""
    by_module: bool = True
    """Whether a run tells which modules made the activations."""
    results: OperatorResults | None = field(default=None, compare=False)
    """What the requests for one target that are made from this one learn of operators, once for all of them."""

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise PlanError(f"accumulation steps must be at least 1, got {self.accumulation_steps}")
        check_further(self.further)

    @property
    def step_kernels(self) -> StepKernels:
        """How the optimizer goes through the parameters."""
        if self.fused_step:
            return StepKernels.FUSED
        return step_kernels(self.target, self.sharding)

    @property
    def step_recipe(self) -> Recipe:
        """The recipe as the engine runs it."""
        return under_deepspeed(self.recipe) if self.sharding.is_zero else self.recipe

    @property
    def settings(self) -> ModelSettings:
        """The model's settings, with adapters where the recipe trains them."""
        if self.recipe.trains_adapters and self.model.adapter_rank is None:
            return replace(self.model, adapter_rank=DEFAULT_ADAPTER_RANK)
        return self.model


class BatchOptions(Protocol):
    """How large a micro batch is, by the names that the options of `memtrace plan` and the keys of a case have."""

    @property
    def batch_size(self) -> int | None:
        """Samples; None for one."""

    @property
    def seq_len(self) -> int | None:
        """Tokens of a text; None for as many as are usual for the model."""

    @property
    def image_size(self) -> int | None:
        """Height and width of images; None for the model's."""

    @property
    def padded(self) -> bool:
        """Whether texts have different lengths."""


class StepOptions(BatchOptions, Protocol):
    """What is trained, and how, by the same names."""

    @property
    def recipe(self) -> str:
        """Its name."""

    @property
    def optimizer(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str | None:
        """Of the weights; None for the recipe's."""

    @property
    def attn(self) -> str | None:
        """Implementation of attention; None for the model's own choice."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""

    @property
    def lora_rank(self) -> int | None:
        """Rank of the adapters; None for that of the recipe."""

    @property
    def lora_targets(self) -> str | None:
        """Modules that get adapters, with commas between; None for all linear ones."""

    @property
    def accumulation_steps(self) -> int:
        """Micro batches for each step of the optimizer."""

    @property
    def keep_outputs(self) -> bool:
        """Whether the loop keeps the output of the model into the next step."""

    @property
    def fused_optimizer(self) -> bool:
        """Whether torch's fused kernel updates the weights."""


def batch_of(options: BatchOptions, configuration: Any) -> BatchSettings:
    """Returns the size of a micro batch for the model of a configuration."""
    return BatchSettings(
        samples=1 if options.batch_size is None else options.batch_size,
        positions=usual_positions(configuration) if options.seq_len is None else options.seq_len,
        image_size=options.image_size,
        padded=options.padded,
    )


def request_of(
    options: StepOptions,
    configuration: Any,
    *,
    target: Target,
    sharding: Sharding,
    device: Device | None = None,
    further: tuple[FurtherModel, ...] = (),
) -> SimulationRequest:
    """Returns what options ask for.

    Raises:
        PlanError: a word has no meaning, or two options do not go together.
    """
    recipe = find_recipe(options.recipe)
    return SimulationRequest(
        configuration=configuration,
        recipe=recipe if options.dtype is None else with_weights(recipe, options.dtype),
        optimizer=options.optimizer,
        model=ModelSettings(
            attention=options.attn,
            gradient_checkpointing=options.gradient_checkpointing,
            adapter_rank=options.lora_rank,
            adapter_targets=named_modules(options.lora_targets),
        ),
        batch=batch_of(options, configuration),
        accumulation_steps=options.accumulation_steps,
        keeps_outputs=options.keep_outputs,
        fused_step=options.fused_optimizer,
        target=target,
        device=device,
        sharding=sharding,
        further=further,
    )


def simulate(request: SimulationRequest) -> SimulatedRun:
    """Runs two steps of the model of a configuration on tensors without memory.

    Raises:
        PlanError: the model cannot be made, refuses the batch, or does what cannot be simulated.
    """
    return run_two_steps(training_of(request))


def training_of(request: SimulationRequest) -> Training:
    """Returns what `simulate` runs for a request."""
    dtype = getattr(torch, request.recipe.weights)
    batch = request.batch
    if request.model.attention == "flash_attention_2":  # it packs the texts of a padded batch: no mask of all pairs
        batch = replace(batch, padded=False)

    def inputs() -> Any:
        own = make_batch(request.configuration, batch, dtype)
        if not request.further:
            return own
        return own, make_further_inputs(request.further, batch, request.step_recipe, own)

    return Training(
        make_model=lambda: build_model(request.configuration, request.settings),
        make_batch=inputs,
        loss=loss_beside if request.further else model_loss,
        further=makers(request.further, request.step_recipe, request.model.attention),
        recipe=request.recipe,
        make_optimizer=make_optimizer(request.optimizer, request.step_kernels),
        accumulation_steps=request.accumulation_steps,
        keeps_outputs=request.keeps_outputs,
        target=request.target,
        sharding=request.sharding,
        workspaces=workspaces_of(request.device),
        results=request.results,
        by_module=request.by_module,
    )


def plan_simulated(request: SimulationRequest, run: SimulatedRun | None = None) -> Plan:
    """Returns the plan for a request; `run` is given where it was simulated already.

    Raises:
        PlanError: as `simulate`.
    """
    run = run or simulate(request)
    plan = plan_of(
        run,
        request.recipe,
        request.optimizer,
        request.target,
        request.sharding,
        step=request.step_kernels,
        device=request.device,
    )
    plan = replace(plan, assumptions=(*plan.assumptions, *_loop(request, run, plan)))
    setup = {
        "model": request.configuration.model_type,
        **plan.setup,
        **further_setup(request.further),
        "gradient_checkpointing": str(request.model.gradient_checkpointing).lower(),
    }
    return replace(plan, setup=setup)


def _loop(request: SimulationRequest, run: SimulatedRun, plan: Plan) -> Iterator[str]:
    """Yields which form of the loop was assumed, where the other one would need another amount of memory."""
    further = request.further
    yield from said_of(further, request.step_recipe, run.further_output_bytes, kept=request.keeps_outputs)
    yield from further_sharding(further, request.sharding)
    if run.output_bytes > MATTERS * plan.total_bytes:
        size = f"{run.output_bytes / GB:.2f} GB"
        if request.keeps_outputs:
            yield f"The loop keeps the output of the model ({size}, mostly logits) into the next step."
        else:
            yield (
                f"The output of the model ({size}, mostly logits) is dropped once the loss is known, as under Trainer; "
                "a loop with `out = model(**batch)` keeps it into the next step: --keep-outputs plans that."
            )
    texts = request.batch.samples > 1 and request.target is Target.CUDA
    if request.model.attention == "flash_attention_2" and request.batch.padded:
        yield "flash_attention_2 packs the texts of a padded batch: it needs no mask of all pairs."
    elif request.batch.padded:
        yield "Texts are padded: attention gets a mask of all pairs of tokens, which flash attention does not take."
    elif texts and FLASH in run.kinds:
        yield (
            "All texts are as long as the longest; with a padding mask attention leaves its flash path: --padded plans "
            "that."
        )


def with_weights(recipe: Recipe, dtype: str) -> Recipe:
    """Returns a recipe with its weights, gradients and uncast products in another type.

    Raises:
        PlanError: the type is no type of weights, or as precise as the recipe's master copies.
    """
    if dtype not in DTYPE_BYTES or dtype == "uint8":
        known = ", ".join(name for name in DTYPE_BYTES if name != "uint8")
        raise PlanError(f"dtype must be one of {known}, got {dtype!r}")
    if recipe.master is not None and DTYPE_BYTES[dtype] >= DTYPE_BYTES[recipe.master]:
        raise PlanError(
            f"the recipe {recipe.name} keeps {recipe.master} copies of 16-bit weights: dtype must be bfloat16 or "
            f"float16, got {dtype!r}; without copies it is the recipe fp32"
        )
    compute = recipe.compute if recipe.casts else dtype
    return replace(recipe, weights=dtype, gradients=dtype, compute=compute)

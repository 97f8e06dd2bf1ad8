"""What a plan by formula is made from, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from memtrace.errors import PlanError
from memtrace.planning.further import MAX_PARAMETERS, FurtherModel, check_further
from memtrace.planning.optimizers.layouts import OptimizerLayout
from memtrace.planning.recipe import DTYPE_BYTES, LORA_TRAINABLE_RATIO, Recipe
from memtrace.planning.sharding.shares import Sharding, Strategy

_NOT_MEGATRON = frozenset({Strategy.ZERO0, Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan by formula is made from."""

    parameters: int
    """Parameters of the model; with LoRA those of the base."""
    recipe: Recipe
    optimizer: OptimizerLayout
    sharding: Sharding = field(default_factory=Sharding)
    trainable_parameters: int | None = None
    """Parameters that are trained. None: all of them; with LoRA 0.2 % on top."""
    activation_ratio: float | None = None
    """Bytes saved for the backward pass, as a share of the weights in the recipe's compute type."""
    activation_bytes: int | None = None
    """The same in bytes. At most one of the two; with neither, activations are not known and not counted."""
    unquantized_parameters: int | None = None
    """Of `parameters`, those that stay out of 4 bits: embedding, head and norms. None: not known, and counted as 0."""
    accumulation_steps: int = 1
    """Micro batches for each optimizer step."""
    layers: int = 32
    """Units that a sharded model is gathered in, and that checkpointing recomputes."""
    largest_layer_parameters: int | None = None
    """Parameters of the largest unit. None: parameters / layers."""
    further: tuple[FurtherModel, ...] = ()
    """Frozen models beside the trained one, by their counts of parameters."""

    def __post_init__(self) -> None:
        _check("parameters", self.parameters, 1, MAX_PARAMETERS)
        _check("layers", self.layers, 1, 10**6)
        _check("accumulation steps", self.accumulation_steps, 1, 10**9)
        if self.trainable_parameters is not None:
            highest = MAX_PARAMETERS if self.recipe.trains_adapters else self.parameters
            _check("trainable parameters", self.trainable_parameters, 0, highest)
        if self.largest_layer_parameters is not None:
            _check("parameters of the largest layer", self.largest_layer_parameters, 1, self.parameters)
        if self.unquantized_parameters is not None:
            if not self.recipe.quantizes:
                raise PlanError(f"unquantized parameters are for the recipe qlora, got {self.recipe.name}")
            _check("unquantized parameters", self.unquantized_parameters, 0, self.parameters)
        check_further(self.further)
        for model in self.further:
            if model.parameters is None:
                raise PlanError(f"a plan from a parameter count takes a count for {model.name}, such as 8e9")
        if self.activation_ratio is not None and self.activation_bytes is not None:
            raise PlanError("activations are given both as a ratio and in bytes: one of them is enough")
        if self.activation_ratio is not None and not 0 <= self.activation_ratio <= 10**6:
            raise PlanError(f"activation ratio must be 0..1000000, got {self.activation_ratio}")
        if self.activation_bytes is not None:
            _check("activation bytes", self.activation_bytes, 0, 2**62)
        if self.recipe.gradients_persist and self.sharding.strategy in _NOT_MEGATRON:
            raise PlanError(
                f"the {self.recipe.name} recipe shards with its distributed optimizer, which is ZeRO 1; "
                f"got {self.sharding.strategy}"
            )

    @property
    def trainable(self) -> int:
        """Parameters that the optimizer updates."""
        if not self.optimizer.steps:
            return 0
        if self.trainable_parameters is not None:
            return self.trainable_parameters
        return ceil(self.parameters * LORA_TRAINABLE_RATIO) if self.recipe.trains_adapters else self.parameters

    @property
    def frozen(self) -> int:
        """Parameters that are only read."""
        return self.parameters if self.recipe.trains_adapters else self.parameters - self.trainable

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest unit."""
        return self.largest_layer_parameters or ceil(self.parameters / self.layers)

    @property
    def activations(self) -> int | None:
        """Bytes saved for the backward pass; None where they are not known."""
        if self.activation_ratio is None:
            return self.activation_bytes
        return round(self.activation_ratio * self.parameters * DTYPE_BYTES[self.recipe.compute])

    @property
    def master(self) -> str | None:
        """Type of the copies that the optimizer updates; None where it updates the weights themselves.

        DeepSpeed's ZeRO optimizers make float32 copies of their own whatever the recipe, except where the weights are
        float32 already (stage 3) or nothing is sharded (stage 0). Source: deepspeed/runtime/zero/stage_1_and_2.py,
        `single_partition_of_fp32_groups`, and stage3.py, `fp32_partitioned_groups_flat`.
        """
        if not self.optimizer.steps:
            return None
        if self.recipe.master is None and self.sharding.is_zero:
            aliased = self.sharding.strategy in (Strategy.ZERO0, Strategy.ZERO3)
            return None if aliased and self.recipe.weights == "float32" else "float32"
        return self.recipe.master


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PlanError(f"{name} must be {low}..{high}, got {value}")

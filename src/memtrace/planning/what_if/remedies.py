"""What would change a plan: each remedy is planned again, and ranked by the bytes that it saves at the peak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.further import without_each
from memtrace.planning.hardware import held_against
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import ZERO_STAGES, Offload, Sharding, Strategy
from memtrace.record.plan import Plan

CHECKPOINTED_SHARE = 2 / 34
"""Activations that full checkpointing keeps of a transformer layer: its input, 2 of 34 bytes for each token and
channel. Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", table 2, without
the attention matrix, which fused attention does not keep."""

_RANKS = 8
"""Ranks that sharding is shown for where the plan has one: the GPUs of one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change and the plan that comes of it."""

    name: str
    plan: Plan
    saved_bytes: int
    """At the peak, against the plan without it."""
    world_size: int
    """Ranks that it takes."""

    def on(self, device: str, usable_bytes: int) -> Remedy:
        """Returns the remedy with the verdict of its plan on a device."""
        return replace(self, plan=held_against(self.plan, device, usable_bytes, self.world_size))


def remedies(request: PlanRequest) -> list[Remedy]:
    """Returns the changes that save anything, the largest saving first.

    Gradient checkpointing is among them only where activations are known.
    """
    before = plan_by_formula(request).total_bytes
    found = []
    for name, changed in _changes(request):
        plan = plan_by_formula(changed)
        if plan.total_bytes < before:
            found.append(
                Remedy(
                    name=name, plan=plan, saved_bytes=before - plan.total_bytes, world_size=changed.sharding.world_size
                )
            )
    return sorted(found, key=lambda remedy: -remedy.saved_bytes)


def _changes(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Yields a name and a changed request for each remedy that can be combined with the rest of the request."""
    for name, fields in _candidates(request):
        try:
            yield name, replace(request, **fields)
        except PlanError:  # the engine of this request does not do it
            continue


def _candidates(request: PlanRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    if not request.recipe.trains_adapters:
        for name, title in (
            ("bf16-master", "bfloat16 weights with float32 masters"),
            ("pure-bf16", "bfloat16 throughout, no master copies"),
        ):
            yield title, {"recipe": find_recipe(name)}
        for name, title in (("lora", "LoRA"), ("qlora", "QLoRA, 4-bit base")):
            yield title, {"recipe": find_recipe(name), "trainable_parameters": None}
    if len(request.optimizer.states) > 1:
        yield "8-bit AdamW", {"optimizer": find_optimizer("adamw8bit")}
        yield "Adafactor", {"optimizer": find_optimizer("adafactor")}
    if request.activations:
        kept = ceil(request.activations * CHECKPOINTED_SHARE + request.activations / request.layers)
        yield "gradient checkpointing", {"activation_ratio": None, "activation_bytes": kept}
    for title, others in without_each(request.further):
        yield title, {"further": others}
    for title, sharding in other_shardings(request.sharding):
        yield title, {"sharding": sharding}


def other_shardings(current: Sharding) -> Iterator[tuple[str, Sharding]]:
    """Yields a title and the sharding for each way to share a model that is not the current one.

    Ranks are those that there are; where there is one, those of a machine with 8 GPUs.
    """
    ranks = current.world_size if current.world_size > 1 else _RANKS
    for strategy in (*ZERO_STAGES[1:], Strategy.FSDP):
        if strategy is not current.strategy or ranks != current.world_size:
            yield f"{strategy.label} over {ranks} GPUs", Sharding(strategy=strategy, world_size=ranks)
    if current.strategy in ZERO_STAGES[1:] and current.offload is Offload.NONE:
        yield "offloading the optimizer", replace(current, offload=Offload.OPTIMIZER)

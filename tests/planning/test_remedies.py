"""What-if: each remedy is a plan of its own."""

from __future__ import annotations

from typing import Any

import pytest

from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.planning.what_if.remedies import CHECKPOINTED_SHARE, remedies
from memtrace.record.categories import Category, Moment
from memtrace.record.units import GB


def request(recipe: str = "bf16-master", optimizer: str = "adamw", **fields: Any) -> PlanRequest:
    """A request for 8 billion parameters, by names."""
    return PlanRequest(parameters=8 * 10**9, recipe=find_recipe(recipe), optimizer=find_optimizer(optimizer), **fields)


def savings(asked: PlanRequest) -> dict[str, int]:
    """Bytes saved by the name of each remedy."""
    return {remedy.name: remedy.saved_bytes for remedy in remedies(asked)}


def test_the_largest_saving_comes_first() -> None:
    """Remedies are ranked by bytes at the peak, and each saves something."""
    found = remedies(request(activation_ratio=0.3))
    assert [remedy.saved_bytes for remedy in found] == sorted((r.saved_bytes for r in found), reverse=True)
    assert found[-1].saved_bytes > 0


def test_savings_are_differences_of_plans() -> None:
    """What a remedy saves is the peak of one plan less the peak of the other."""
    asked = request(activation_ratio=0.3)
    before = plan_by_formula(asked).total_bytes
    for remedy in remedies(asked):
        assert remedy.saved_bytes == before - remedy.plan.total_bytes


def test_known_savings() -> None:
    """By hand: no masters and bf16 moments save 8 bytes a parameter, 8-bit moments 8 less 2 and 8/256."""
    found = savings(request(activation_ratio=0.3))
    assert found["bfloat16 throughout, no master copies"] == 8 * 8 * GB
    assert found["8-bit AdamW"] == 8 * (8 - 2) * GB - 8 * 8 * GB // 256
    assert found["ZeRO 1 over 8 GPUs"] == 12 * 8 * GB * 7 // 8 - GB  # the reduce bucket


def test_checkpointing_only_where_activations_are_known() -> None:
    """Without activations nobody can say what recomputing them saves."""
    assert "gradient checkpointing" not in savings(request())
    found = remedies(request(activation_ratio=0.3, layers=32))
    (checkpointed,) = [remedy for remedy in found if remedy.name == "gradient checkpointing"]
    kept = checkpointed.plan.moments[Moment.PEAK][Category.ACTIVATIONS]
    assert kept == pytest.approx(4.8e9 * (CHECKPOINTED_SHARE + 1 / 32), abs=1)


@pytest.mark.parametrize(
    ("asked", "absent"),
    [
        (request("pure-bf16"), "bfloat16 throughout, no master copies"),
        (request("qlora"), "LoRA"),
        (request(optimizer="sgd-momentum"), "8-bit AdamW"),
        (request(sharding=Sharding(strategy=Strategy.ZERO2, world_size=4)), "ZeRO 2 over 4 GPUs"),
        (request("megatron"), "FSDP over 8 GPUs"),
        (request(), "offloading the optimizer"),
    ],
)
def test_what_changes_nothing_or_does_not_go_is_not_proposed(asked: PlanRequest, absent: str) -> None:
    """What is done already, saves nothing or is not possible there is left out."""
    assert absent not in savings(asked)


def test_offloading_is_proposed_under_zero() -> None:
    """Masters, moments and gradients of this rank's share leave the device, and the float32 gradients of the step."""
    asked = request(sharding=Sharding(strategy=Strategy.ZERO2, world_size=4))
    assert savings(asked)["offloading the optimizer"] == (12 + 2 + 4) * 2 * GB - GB  # then backward is the peak
    offloaded = request(sharding=Sharding(strategy=Strategy.ZERO2, world_size=4, offload=Offload.OPTIMIZER))
    assert "offloading the optimizer" not in savings(offloaded)

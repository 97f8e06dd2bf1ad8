"""The recipes, in bytes a parameter."""

from __future__ import annotations

from fractions import Fraction

import pytest

from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import DTYPE_BYTES, NF4_BASE, RECIPES, find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.record.categories import Category, Moment

P = 10**9


BYTES = {
    "fp32": {Category.WEIGHTS: 4, Category.GRADIENTS: 4, Category.OPTIMIZER_STATE: 8},
    "hf-autocast": {
        Category.WEIGHTS: 4,
        Category.GRADIENTS: 4,
        Category.OPTIMIZER_STATE: 8,
        Category.TRANSIENT_WEIGHTS: 2,
    },
    "pure-bf16": {Category.WEIGHTS: 2, Category.GRADIENTS: 2, Category.OPTIMIZER_STATE: 4},
    "bf16-master": {
        Category.WEIGHTS: 2,
        Category.MASTER_WEIGHTS: 4,
        Category.GRADIENTS: 2,
        Category.OPTIMIZER_STATE: 8,
    },
    "fp16-master": {
        Category.WEIGHTS: 2,
        Category.MASTER_WEIGHTS: 4,
        Category.GRADIENTS: 2,
        Category.OPTIMIZER_STATE: 8,
    },
    "megatron": {
        Category.WEIGHTS: 2,
        Category.MASTER_WEIGHTS: 4,
        Category.GRADIENTS: 4,
        Category.OPTIMIZER_STATE: 8,
    },
}


@pytest.mark.parametrize(("name", "each"), BYTES.items())
def test_bytes_a_parameter(name: str, each: dict[Category, int]) -> None:
    """With AdamW each recipe takes what its documentation says for each parameter."""
    request = PlanRequest(parameters=P, recipe=find_recipe(name), optimizer=find_optimizer("adamw"))
    peak = plan_by_formula(request).moments[Moment.PEAK]
    assert peak.by_category() == {category: size * P for category, size in each.items()}


def test_lora_keeps_states_for_the_adapters_only() -> None:
    """The base is frozen in bfloat16; 16 bytes and a 2-byte cast go to each adapter parameter."""
    request = PlanRequest(
        parameters=P, recipe=find_recipe("lora"), optimizer=find_optimizer("adamw"), trainable_parameters=10**6
    )
    peak = plan_by_formula(request).moments[Moment.PEAK]
    assert peak.total_bytes == 2 * P + 18 * 10**6
    assert peak[Category.OPTIMIZER_STATE] == 8 * 10**6


def test_qlora_stores_4_127_bits_a_parameter() -> None:
    """NF4 with double quantization: 4 bits and 0.127 bits of constants, the figure of the paper."""
    bits = 8 * sum(stored.bytes_each for stored in NF4_BASE)
    assert bits == 4 + Fraction(8, 64) + Fraction(32, 64 * 256)
    assert round(float(bits), 3) == 4.127


def test_every_type_has_a_size_and_every_recipe_a_source() -> None:
    """Nothing in the table is left to look up."""
    for recipe in RECIPES.values():
        assert {recipe.weights, recipe.gradients, recipe.compute, recipe.updated} <= set(DTYPE_BYTES)
        assert recipe.source and recipe.summary


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    """A misspelt recipe is an error that helps; one that is like none lists all."""
    with pytest.raises(PlanError, match="did you mean 'bf16-master'"):
        find_recipe("bf16master")
    with pytest.raises(PlanError, match=r"expected one of fp32, hf-autocast"):
        find_recipe("?")
    assert find_recipe("LoRA").name == "lora"

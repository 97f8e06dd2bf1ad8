"""What the loop keeps, padded batches and modules kept in float32: forms of training that a plan is told of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, T5Config

import memtrace
from memtrace.planning.recipe import find_recipe
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated, with_weights
from memtrace.record.categories import Category, Moment
from memtrace.simulation.models.builds import BatchSettings, ModelSettings, build_model, make_batch

CONFIG = LlamaConfig(
    vocab_size=4000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
)
REQUEST = SimulationRequest(
    configuration=CONFIG, recipe=find_recipe("pure-bf16"), batch=BatchSettings(samples=4, positions=256)
)
LOGITS = 2 * 4 * 256 * 4000


def test_kept_outputs_are_the_logits_of_the_step_before() -> None:
    """They are there at every moment, one set between steps and two while the next one is made; a sentence says which
    form was assumed, in both."""
    dropped, kept = plan_simulated(REQUEST), plan_simulated(replace(REQUEST, keeps_outputs=True))
    beyond = {moment: kept.moments[moment].total_bytes - dropped.moments[moment].total_bytes for moment in kept.moments}
    assert LOGITS <= beyond[Moment.STEP_END] <= LOGITS + 512  # and the loss
    assert LOGITS <= beyond[Moment.PEAK] <= 2 * LOGITS + 512
    assert any("--keep-outputs plans that" in said for said in dropped.assumptions)
    assert any("keeps the output" in said for said in kept.assumptions)
    model = ModelSettings()
    same = memtrace.plan(
        lambda: build_model(CONFIG, model),
        lambda: make_batch(CONFIG, REQUEST.batch, torch.bfloat16),
        recipe="pure-bf16",
        keep_outputs=True,
    )
    assert same.total_bytes == kept.total_bytes


def test_what_hardly_matters_is_not_said() -> None:
    """One short text has few logits and no padding."""
    words = " ".join(plan_simulated(replace(REQUEST, batch=BatchSettings(positions=8))).assumptions)
    assert "keep-outputs" not in words
    assert "padded" not in words


def test_padding_takes_attention_off_its_flash_path() -> None:
    """A mask of all pairs of tokens comes instead, in each layer; flash attention's own package packs the texts."""
    padded = replace(REQUEST, batch=replace(REQUEST.batch, padded=True))
    even, uneven = plan_simulated(REQUEST), plan_simulated(padded)
    activations = [plan.moments[Moment.FORWARD_END][Category.ACTIVATIONS] for plan in (even, uneven)]
    assert activations[1] - activations[0] >= 4 * 256 * 256  # a byte for each pair at least
    assert any("--padded plans that" in said for said in even.assumptions)
    assert any("mask of all pairs" in said for said in uneven.assumptions)
    packed = replace(padded, model=ModelSettings(attention="flash_attention_2"))
    assert plan_simulated(packed).total_bytes == even.total_bytes


@pytest.mark.parametrize(("dtype", "kept"), [("float16", 1), ("bfloat16", 0)])
def test_modules_that_a_class_keeps_in_float32(dtype: str, kept: int) -> None:
    """T5's `wo` is float32 in a float16 model; a bfloat16 one converts it with the rest."""
    configuration = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    request: Any = SimulationRequest(
        configuration=configuration,
        recipe=with_weights(find_recipe("pure-bf16"), dtype),
        batch=BatchSettings(positions=16),
    )
    weights = plan_simulated(request).moments[Moment.STEP_END].entries.items()
    held = sum(size for key, size in weights if key.category is Category.WEIGHTS and key.dtype == "float32")
    assert held == kept * 2 * 4 * 32 * 48

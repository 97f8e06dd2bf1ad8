"""LoRA on a frozen base, from birth: float32, bf16, and quantised to 8 and 4 bits with bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from tables import check_table, per_parameter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import claim_model
from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

BASES = ("float32", "bfloat16", "8-bit", "4-bit")
HIDDEN, LAYERS, VOCABULARY, RANK = 128, 2, 256, 8


def build_base(kind: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float32 if kind == "float32" else torch.bfloat16)
    if "bit" in kind:
        quantise(model.model, kind)
    return model


def quantise(model: nn.Module, kind: str) -> None:
    """Replaces the linear layers by quantised ones; `.to` packs their weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                shape = (child.in_features, child.out_features)
                if kind == "4-bit":
                    layer = bitsandbytes.nn.Linear4bit(*shape, bias=False, quant_type="nf4")
                    layer.weight = bitsandbytes.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4", module=layer
                    )
                else:
                    layer = bitsandbytes.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
                    layer.weight = bitsandbytes.nn.Int8Params(
                        child.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                setattr(parent, name, layer.to("cpu"))


def train(kind: str, *, merged: bool = False, own_dtype: bool = False) -> tuple[peft.PeftModel, StepRecord]:
    """Returns the model and the last traced record of two steps, watched from birth."""
    source = CpuEvents()
    source.open()
    lora = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_base(kind), lora, autocast_adapter_dtype=not own_dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)
    batch = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    with Tracer(model, optimizer, config, source=source) as tracer:
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if merged:
                model.merge_adapter()
                model.unmerge_adapter()
        record = next(record for record in reversed(tracer.history) if record.traced)
    return model, record


LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN)
"""Elements of the linear layers below the head."""
OTHER = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
"""Elements of embedding, head and norms."""
ADAPTERS = LAYERS * 2 * 2 * RANK * HIDDEN
"""Elements of the LoRA matrices: two of them for the queries and the values of each layer."""


def size_of(record: StepRecord, category: Category, component: str, dtype: str | None = None) -> int:
    entries = record.moments[Moment.BACKWARD_END].entries
    return sum(
        size
        for key, size in entries.items()
        if (key.category, key.component) == (category, component) and dtype in (None, key.dtype)
    )


@pytest.fixture(scope="module")
def measured() -> dict[str, StepRecord]:
    return {kind: train(kind)[1] for kind in BASES}


@pytest.mark.parametrize("kind", BASES)
def test_categories_add_up_and_nothing_is_left(measured, kind):
    """Law 1 at every moment, and at the peak at most 1 % that nobody claims."""
    for moment in measured[kind].moments.values():
        assert moment.total_bytes == moment.allocated_bytes
    peak = measured[kind].moments[Moment.PEAK]
    assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


@pytest.mark.parametrize(("kind", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_frozen_base_has_its_closed_form(measured, kind, width):
    """Every element of the base is a frozen weight in its own precision."""
    assert size_of(measured[kind], Category.WEIGHTS, "frozen", kind) == width * (LINEAR + OTHER)


@pytest.mark.parametrize("kind", BASES)
def test_adapters_alone_have_gradients_and_state(measured, kind):
    """PEFT keeps adapters in float32: four bytes each for weights, gradients, exp_avg and exp_avg_sq."""
    record = measured[kind]
    assert size_of(record, Category.WEIGHTS, "trainable", "float32") == 4 * ADAPTERS
    assert size_of(record, Category.GRADIENTS, "") == 4 * ADAPTERS
    assert size_of(record, Category.OPTIMIZER_STATE, "exp_avg") == 4 * ADAPTERS
    assert size_of(record, Category.OPTIMIZER_STATE, "exp_avg_sq") == 4 * ADAPTERS


def test_adapters_keep_the_precision_of_their_base():
    """With `autocast_adapter_dtype=False` on a bf16 base: two bytes each for weights, gradients and both moments."""
    _, record = train("bfloat16", own_dtype=True)
    assert size_of(record, Category.WEIGHTS, "trainable", "bfloat16") == 2 * ADAPTERS
    assert size_of(record, Category.WEIGHTS, "trainable", "float32") == 0
    assert size_of(record, Category.GRADIENTS, "", "bfloat16") == 2 * ADAPTERS
    assert size_of(record, Category.OPTIMIZER_STATE, "exp_avg", "bfloat16") == 2 * ADAPTERS
    assert size_of(record, Category.OPTIMIZER_STATE, "exp_avg_sq", "bfloat16") == 2 * ADAPTERS


def test_eight_bit_weights_have_their_packed_size(measured):
    """One byte an element, and one float32 scale for each row of a matrix."""
    rows = LAYERS * (4 * HIDDEN + 2 * 2 * HIDDEN + HIDDEN)
    assert size_of(measured["8-bit"], Category.WEIGHTS, "frozen", "int8") == LINEAR
    assert size_of(measured["8-bit"], Category.WEIGHTS, "frozen", "float32") == 4 * rows


def test_four_bit_weights_have_their_packed_size(measured):
    """Half a byte an element, a scale of one byte for each block of 64, and tables of scales and codes."""
    record, matrices = measured["4-bit"], 7 * LAYERS
    assert size_of(record, Category.WEIGHTS, "frozen", "uint8") == LINEAR // 2 + LINEAR // 64
    scales_of_scales = 4 * LINEAR // 64 // 256
    codes = size_of(record, Category.WEIGHTS, "frozen", "float32") - scales_of_scales
    assert 0 < codes <= 4 * (16 + 256 + 1) * matrices


def test_merging_and_unmerging_leaves_the_categories(measured):
    """Merged weights are the base's own storage: after unmerging nothing is more than before."""
    _, record = train("float32", merged=True)
    for moment in (Moment.FORWARD_END, Moment.BACKWARD_END):
        persistent = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
        for category in persistent:
            assert record.moments[moment][category] == measured["float32"].moments[moment][category]


def weights_of(model: nn.Module) -> dict[str, int]:
    """Returns the bytes of the weights by component, as a tracer that is attached now knows them."""
    ledger = Ledger(torch.device("cpu"))
    claim_model(model, ledger)
    return {tag.component: size for tag, size in ledger.totals().items() if tag.category is Category.WEIGHTS}


def test_merged_adapters_stay_until_they_are_unloaded():
    """Merged, the base's storages are the same and the adapters are still there; unloaded, the base alone is left."""
    model, _ = train("float32")
    unmerged = weights_of(model)
    assert unmerged == {"frozen": 4 * (LINEAR + OTHER), "trainable": 4 * ADAPTERS}
    model.merge_adapter()
    assert weights_of(model) == unmerged
    assert weights_of(model.merge_and_unload()) == {"frozen": 4 * (LINEAR + OTHER)}


def test_adapters_that_are_unloaded_are_gone_with_the_next_counted_step():
    """Training goes on with another part of the base: the steps after have the base alone, without a trace."""
    lora = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_base("float32"), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)
    batch = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))

    def weights_after(trained: nn.Module) -> int:
        for _ in range(3):
            trained(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not tracer.latest.traced
        return tracer.latest.moments[Moment.STEP_END][Category.WEIGHTS]

    with Tracer(model, optimizer, config) as tracer:
        assert weights_after(model) == 4 * (LINEAR + OTHER + ADAPTERS)
        base = model.merge_and_unload()
        optimizer.param_groups[0]["params"] = [base.lm_head.weight.requires_grad_()]
        assert weights_after(base) == 4 * (LINEAR + OTHER)


def test_the_page_has_the_measured_bytes(measured):
    """docs/engines.md shows the bytes per parameter of the whole model."""
    rows = []
    for kind, record in measured.items():
        parts: list[Any] = [
            size_of(record, Category.WEIGHTS, "frozen"),
            size_of(record, Category.WEIGHTS, "trainable"),
            record.moments[Moment.BACKWARD_END][Category.GRADIENTS],
            record.moments[Moment.BACKWARD_END][Category.OPTIMIZER_STATE],
        ]
        rows.append([kind, *(per_parameter(part, LINEAR + OTHER + ADAPTERS) for part in parts)])
    check_table("peft", ["base", "frozen", "trainable", "gradients", "optimizer state"], rows)

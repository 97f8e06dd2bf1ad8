"""Models and batches from configurations: the right class, the right inputs, and a plan that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import memtrace
from memtrace.errors import PlanError
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import Plan
from memtrace.simulation.models.builds import (
    BatchSettings,
    ModelSettings,
    build_bare,
    build_model,
    make_batch,
    model_class,
)

TEXT = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
POSITIONS = 24

CONFIGURATIONS = {
    "llama": transformers.LlamaConfig(**TEXT),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS),
    "bert": transformers.BertConfig(**TEXT),
    "t5": transformers.T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2),
    "bart": transformers.BartConfig(
        vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=POSITIONS,
    ),
    "vit": transformers.ViTConfig(**{**TEXT, "image_size": 32, "patch_size": 8}),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "whisper": transformers.WhisperConfig(
        vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=POSITIONS, pad_token_id=0, decoder_start_token_id=1,
    ),
    "mixtral": transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2),
    "mamba": transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4),
}  # fmt: skip


def planned(name: str, model: ModelSettings, batch: BatchSettings, **settings: Any) -> Plan:
    configuration = CONFIGURATIONS[name]
    return memtrace.plan(
        lambda: build_model(configuration, model),
        lambda: make_batch(configuration, batch, torch.bfloat16),
        recipe=settings.pop("recipe", "pure-bf16"),
        **settings,
    )


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_kind_of_model_gets_a_batch_that_it_takes(name: str) -> None:
    """Text, images and sounds: the plan has the parameters of the real model, and something saved for backward."""
    plan = planned(name, ModelSettings(), BatchSettings(samples=2, positions=POSITIONS, image_size=32))
    with torch.device("meta"):
        model = build_model(CONFIGURATIONS[name], ModelSettings())
    assert plan.setup["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0


def test_ties_that_transformers_leaves_out_on_the_meta_device_are_made() -> None:
    """As transformers 5.0 does for every model, whose plan would have its embedding twice."""

    class LeftOut(transformers.LlamaForCausalLM):
        def init_weights(self) -> None:
            """Makes no ties."""

    for tied in (True, False):
        configuration = transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied)
        with torch.device("meta"):
            assert LeftOut._from_config(configuration).lm_head.weight is not None
            model = build_bare(LeftOut, configuration, None)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_the_class_is_the_one_that_the_configuration_names() -> None:
    """A classifier is planned as a classifier, and a bare body as the first task that has a loss."""
    named = transformers.BertConfig(**TEXT, architectures=["BertForTokenClassification"])
    body = transformers.BertConfig(**TEXT, architectures=["BertModel"])
    assert model_class(named).__name__ == "BertForTokenClassification"
    assert model_class(body).__name__ == "BertForMaskedLM"


def test_a_configuration_without_a_loss_is_refused() -> None:
    """A body that no task uses needs a loss from Python."""
    with pytest.raises(PlanError, match="no detr that computes a loss"):
        model_class(transformers.DetrConfig(use_timm_backbone=False, backbone_config=transformers.ResNetConfig()))


def test_checkpointing_and_eager_attention_change_the_activations() -> None:
    """Checkpointing leaves less, plain attention keeps the matrices of scores."""
    batch = BatchSettings(samples=2, positions=POSITIONS)
    usual, less, more = (
        planned("llama", settings, batch).moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        for settings in (ModelSettings(), ModelSettings(gradient_checkpointing=True), ModelSettings(attention="eager"))
    )
    assert less < usual < more


def test_adapters_are_the_only_thing_that_is_trained() -> None:
    """LoRA: a frozen bfloat16 base, float32 adapters, and states for the adapters alone."""
    plan = planned("llama", ModelSettings(adapter_rank=2), BatchSettings(positions=POSITIONS), recipe="lora")
    trainable = int(plan.setup["trainable_parameters"])
    frozen = int(plan.setup["parameters"]) - trainable
    step_end = {(key.component, key.dtype): size for key, size in plan.moments[Moment.STEP_END].entries.items()}
    assert step_end["frozen", "bfloat16"] == 2 * frozen
    assert step_end["trainable", "float32"] == 4 * trainable
    assert step_end["exp_avg", "float32"] == 4 * trainable
    assert 0 < trainable < frozen


def test_checkpointing_with_adapters_still_trains_them() -> None:
    """Frozen embeddings would leave checkpointed blocks without gradients."""
    settings = ModelSettings(adapter_rank=2, gradient_checkpointing=True)
    plan = planned("llama", settings, BatchSettings(positions=POSITIONS), recipe="lora")
    assert plan.moments[Moment.BACKWARD_END][Category.GRADIENTS] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSettings(attention="flash"), "attention must be one of eager, sdpa, flash_attention_2"),
        (lambda: ModelSettings(adapter_rank=0), "rank of adapters must be 1..4096, got 0"),
        (lambda: BatchSettings(samples=0), "batch size must be 1.."),
        (lambda: BatchSettings(positions=-1), "sequence length must be 1.."),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    """The message names the setting and its range."""
    with pytest.raises(PlanError, match=message):
        make()


def test_texts_longer_than_the_table_of_positions_are_refused() -> None:
    """A lookup beyond the table would fail in training; a simulation has no values to see it by."""
    with pytest.raises(PlanError, match=f"at most max_position_embeddings, {POSITIONS}, of this gpt2, got 25"):
        make_batch(CONFIGURATIONS["gpt2"], BatchSettings(positions=POSITIONS + 1), torch.float32)
    assert (
        make_batch(CONFIGURATIONS["llama"], BatchSettings(positions=10**5), torch.float32)["input_ids"].numel() == 10**5
    )


def test_images_need_a_size() -> None:
    """Where the configuration says none, the settings must."""
    with pytest.raises(PlanError, match="resnet has no image_size: give the size of images"):
        make_batch(CONFIGURATIONS["resnet"], BatchSettings(), torch.float32)


def test_a_model_is_made_without_weights() -> None:
    """Under the meta device a model of any size takes no memory."""
    with torch.device("meta"):
        model = build_model(transformers.LlamaConfig(), ModelSettings())
    assert isinstance(model, nn.Module)
    assert all(parameter.is_meta for parameter in model.parameters())

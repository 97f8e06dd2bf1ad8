"""The tables that the laws run over: model families x recipes x ways to run a step.

Every model is tiny and real: built from its configuration, or from plain torch, without a download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import model_families
import torch
from model_families import Batch, ConvNet, Recurrent, Size, class_loss, own_loss
from torch import nn

VOCABULARY = 96
POSITIONS = 12
SAMPLES = 2


class Recipe(StrEnum):
    """Which precision weights, master copies and activations have."""

    FP32 = "fp32"
    BF16 = "bf16"
    AUTOCAST = "fp32-bf16-autocast"
    BF16_MASTER = "bf16-fp32-master"

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self in (Recipe.BF16, Recipe.BF16_MASTER) else torch.float32


class Way(StrEnum):
    """How the loop runs one step."""

    PLAIN = "plain"
    ACCUMULATION = "accumulation"
    REENTRANT = "reentrant"
    NON_REENTRANT = "non-reentrant"

    @property
    def micro_batches(self) -> int:
        return 2 if self is Way.ACCUMULATION else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model: how to build one, what it is fed, and what it is trained on."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    left_out: Mapping[Recipe | Way, str] = field(default_factory=dict)
    """What this family cannot do, with the reason."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One row of the table."""

    family: Family
    recipe: Recipe
    way: Way

    def __str__(self) -> str:
        return f"{self.family.name}-{self.recipe}-{self.way}"

    def build(self) -> nn.Module:
        """Returns the model in training mode, with its weights in the recipe's precision, checkpointed or not."""
        model = self.family.build().to(self.recipe.weights_dtype).train()
        if self.way in (Way.REENTRANT, Way.NON_REENTRANT):
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": self.way is Way.REENTRANT})
        return model

    def batch(self) -> Batch:
        """Returns one micro batch, its floating-point tensors in the precision of the weights."""
        return {
            name: tensor.to(self.recipe.weights_dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.family.batch().items()
        }


class FrozenBase(nn.Module):
    """A frozen body under a trainable head: the weights of an adapter run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.body.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(features))


SIZE = Size(vocabulary=VOCABULARY, positions=POSITIONS, samples=SAMPLES, image=16)


def _causal() -> Batch:
    ids = SIZE.ids()
    return {"input_ids": ids, "labels": ids}


def _llama(*, tied: bool) -> nn.Module:
    return model_families.llama(
        SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


_ENCODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
_MIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 2}

FAMILIES = (
    Family(name="llama-gqa", build=lambda: _llama(tied=False), batch=_causal, loss=own_loss),
    Family(name="llama-tied", build=lambda: _llama(tied=True), batch=_causal, loss=own_loss),
    Family(name="gpt2", build=lambda: model_families.gpt2(SIZE, 24, 2, 2), batch=_causal, loss=own_loss),
    Family(name="bert", build=lambda: model_families.bert(SIZE, **_ENCODER), batch=SIZE.classified_text, loss=own_loss),
    Family(name="t5", build=lambda: model_families.t5(SIZE, **_T5), batch=SIZE.sequence_to_sequence, loss=own_loss),
    Family(name="vit", build=lambda: model_families.vit(SIZE, **_ENCODER), batch=SIZE.images, loss=own_loss),
    Family(name="mixtral", build=lambda: model_families.mixtral(SIZE, **_MIXTRAL), batch=_causal, loss=own_loss),
    Family(name="mamba", build=lambda: model_families.mamba(SIZE, 24, 1, 4), batch=_causal, loss=own_loss),
    Family(
        name="whisper",
        build=lambda: model_families.whisper(SIZE, width=24, layers=1, heads=2, inner=40, bins=8),
        batch=lambda: SIZE.sound(8),
        loss=own_loss,
    ),
    Family(
        name="convnet",
        build=lambda: ConvNet((3, 8, 8, 12)),
        batch=lambda: SIZE.images("images"),
        loss=class_loss,
    ),
    Family(
        name="lstm",
        build=lambda: Recurrent(SIZE, 16, tied=True),
        batch=lambda: {"ids": SIZE.ids(), "labels": SIZE.ids()},
        loss=class_loss,
        left_out={
            Way.REENTRANT: "an LSTM is one call: there is no block to compute again",
            Way.NON_REENTRANT: "an LSTM is one call: there is no block to compute again",
        },
    ),
    Family(
        name="frozen-base",
        build=FrozenBase,
        batch=lambda: {"features": torch.randn(SAMPLES, 16), "labels": SIZE.labels()},
        loss=class_loss,
        left_out={
            Way.REENTRANT: "two layers: nothing to checkpoint",
            Way.NON_REENTRANT: "two layers: nothing to checkpoint",
        },
    ),
)


def combinations() -> list[Combination]:
    """Returns every row of the table that its family can do."""
    return [
        Combination(family, recipe, way)
        for family in FAMILIES
        for recipe in Recipe
        for way in Way
        if recipe not in family.left_out and way not in family.left_out
    ]

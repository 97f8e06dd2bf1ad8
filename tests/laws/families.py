"""The tables that the laws run over: model families x recipes x ways to run a step.

Every model is tiny and real: built from its configuration, or from plain torch, without a download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY = 96
POSITIONS = 12
SAMPLES = 2

Batch = dict[str, torch.Tensor]


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


class ConvNet(nn.Module):
    """Convolutions with BatchNorm: buffers that the forward pass writes."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
            for before, after in ((3, 8), (8, 8), (8, 12))
        ]
        self.stem, self.blocks = blocks[0], nn.ModuleList(blocks[1:])
        self.head = nn.Linear(12, 5)
        self._use_reentrant: bool | None = None

    def activation_checkpointing_enable(self, settings: Mapping[str, bool]) -> None:
        self._use_reentrant = settings["use_reentrant"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            if self._use_reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self._use_reentrant)
        return self.head(hidden.mean((2, 3)))


def lstm_kernel(hidden: torch.Tensor) -> AbstractContextManager[object]:
    """Leaves oneDNN out for bfloat16: some processors have its LSTM for that, others raise."""
    low = torch.is_autocast_enabled("cpu") or hidden.dtype is torch.bfloat16
    return torch.backends.mkldnn.flags(enabled=not low)


class Recurrent(nn.Module):
    """An LSTM over embeddings, its output matrix tied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        with lstm_kernel(hidden):
            return self.head(self.lstm(hidden)[0])


class FrozenBase(nn.Module):
    """A frozen body under a trainable head: the weights of an adapter run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.body.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(features))


def _ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (SAMPLES, POSITIONS))


def _causal() -> Batch:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model computes itself."""
    return model(**batch).loss


def _classes(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss outside the model, over classes."""
    first = next(tensor for name, tensor in batch.items() if name != "labels")
    return F.cross_entropy(model(first).flatten(0, -2).float(), batch["labels"].flatten())


def _llama(*, tied: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=24, n_layer=2, n_head=2, use_cache=False
        )
    )


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=POSITIONS,
            num_labels=5,
        )
    )


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=12,
            d_ff=40,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
    )


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=POSITIONS,
            use_cache=False,
        )
    )


def _mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, state_size=4, use_cache=False
        )
    )


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=24,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            num_mel_bins=8,
            max_source_positions=POSITIONS,
            max_target_positions=POSITIONS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        )
    )


FAMILIES = (
    Family(name="llama-gqa", build=lambda: _llama(tied=False), batch=_causal, loss=_own_loss),
    Family(name="llama-tied", build=lambda: _llama(tied=True), batch=_causal, loss=_own_loss),
    Family(name="gpt2", build=_gpt2, batch=_causal, loss=_own_loss),
    Family(
        name="bert",
        build=_bert,
        batch=lambda: {"input_ids": _ids(), "labels": torch.randint(0, 5, (SAMPLES,))},
        loss=_own_loss,
    ),
    Family(name="t5", build=_t5, batch=lambda: {"input_ids": _ids(), "labels": _ids()}, loss=_own_loss),
    Family(
        name="vit",
        build=_vit,
        batch=lambda: {"pixel_values": torch.randn(SAMPLES, 3, 16, 16), "labels": torch.randint(0, 5, (SAMPLES,))},
        loss=_own_loss,
    ),
    Family(name="mixtral", build=_mixtral, batch=_causal, loss=_own_loss),
    Family(name="mamba", build=_mamba, batch=_causal, loss=_own_loss),
    Family(
        name="whisper",
        build=_whisper,
        batch=lambda: {"input_features": torch.randn(SAMPLES, 8, 2 * POSITIONS), "labels": _ids()},
        loss=_own_loss,
    ),
    Family(
        name="convnet",
        build=ConvNet,
        batch=lambda: {"images": torch.randn(SAMPLES, 3, 16, 16), "labels": torch.randint(0, 5, (SAMPLES,))},
        loss=_classes,
    ),
    Family(
        name="lstm",
        build=Recurrent,
        batch=lambda: {"ids": _ids(), "labels": _ids()},
        loss=_classes,
        left_out={
            Way.REENTRANT: "an LSTM is one call: there is no block to compute again",
            Way.NON_REENTRANT: "an LSTM is one call: there is no block to compute again",
        },
    ),
    Family(
        name="frozen-base",
        build=FrozenBase,
        batch=lambda: {"features": torch.randn(SAMPLES, 16), "labels": torch.randint(0, 5, (SAMPLES,))},
        loss=_classes,
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

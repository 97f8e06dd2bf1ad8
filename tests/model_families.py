"""Kinds of models that the tests train, of any size: built from their configuration, or from plain torch.

`laws.families` has tiny ones, `planning.larger_families` ones at which weights and activations make the peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 5

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large models of one table are, and their batches."""

    vocabulary: int
    positions: int
    samples: int
    image: int
    """Side of an image, in pixels."""
    first_id: int = 0
    """Smallest token: smaller ones mean something to some models."""

    @property
    def text(self) -> dict[str, object]:
        """What configurations of models of text have in common."""
        return {"vocab_size": self.vocabulary, "max_position_embeddings": self.positions, "use_cache": False}

    def ids(self) -> torch.Tensor:
        return torch.randint(self.first_id, self.vocabulary, (self.samples, self.positions))

    def labels(self) -> torch.Tensor:
        return torch.randint(0, CLASSES, (self.samples,))

    def sequence_to_sequence(self) -> Batch:
        return {"input_ids": self.ids(), "labels": self.ids()}

    def classified_text(self) -> Batch:
        return {"input_ids": self.ids(), "labels": self.labels()}

    def images(self, name: str = "pixel_values") -> Batch:
        return {name: torch.randn(self.samples, 3, self.image, self.image), "labels": self.labels()}

    def sound(self, bins: int) -> Batch:
        return {"input_features": torch.randn(self.samples, bins, 2 * self.positions), "labels": self.ids()}


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model computes itself."""
    return model(**batch).loss


def class_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss outside the model, over classes."""
    first = next(tensor for name, tensor in batch.items() if name != "labels")
    return F.cross_entropy(model(first).flatten(0, -2).float(), batch["labels"].flatten())


def llama(size: Size, **settings: object) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size.text, **settings))


def gpt2(size: Size, width: int, layers: int, heads: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            use_cache=False,
        )
    )


def bert(size: Size, **settings: object) -> nn.Module:
    lengths = {"vocab_size": size.vocabulary, "max_position_embeddings": size.positions}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**lengths, num_labels=CLASSES, **settings)
    )


def t5(size: Size, **settings: object) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=size.vocabulary, decoder_start_token_id=0, use_cache=False, **settings)
    )


def vit(size: Size, **settings: object) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=size.image, patch_size=8, num_labels=CLASSES, **settings)
    )


def mixtral(size: Size, implementation: str | None = None, **settings: object) -> nn.Module:
    config = transformers.MixtralConfig(**size.text, num_local_experts=4, **settings)
    if implementation is None:
        return transformers.MixtralForCausalLM(config)
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation=implementation)


def mamba(size: Size, width: int, layers: int, states: int) -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=size.vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=states, use_cache=False
        )
    )


def whisper(size: Size, *, width: int, layers: int, heads: int, inner: int, bins: int) -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=size.vocabulary,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=inner,
            decoder_ffn_dim=inner,
            num_mel_bins=bins,
            max_source_positions=size.positions,
            max_target_positions=size.positions,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        )
    )


class ConvNet(nn.Module):
    """Convolutions with BatchNorm: buffers that the forward pass writes. All blocks but the first can be checkpointed.

    Args:
        channels: of the images, and of each block's output.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
            for before, after in pairwise(channels)
        ]
        self.stem, self.blocks = blocks[0], nn.ModuleList(blocks[1:])
        self.head = nn.Linear(channels[-1], CLASSES)
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
    return torch.backends.mkldnn.flags(enabled=False) if low else nullcontext()


class Recurrent(nn.Module):
    """An LSTM over embeddings.

    Args:
        size: of its vocabulary.
        width: of embeddings and hidden states.
        tied: whether its output matrix is that of the embeddings; then there is dropout too.
    """

    def __init__(self, size: Size, width: int, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.1 if tied else 0.0, batch_first=True)
        self.head = nn.Linear(width, size.vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        with lstm_kernel(hidden):
            return self.head(self.lstm(hidden)[0])

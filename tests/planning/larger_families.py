"""Models of a size at which weights and activations, not the scratch of CPU kernels, make the peak.

The families of `laws.families` again, ten to a hundred times as large: each step takes a fraction of a second.
"""

from __future__ import annotations

import model_families
import torch
import transformers
from laws.families import Family, Way
from model_families import Batch, ConvNet, Recurrent, Size, class_loss, own_loss
from torch import nn

VOCABULARY = 2000
POSITIONS = 64
SAMPLES = 3
SIZE = Size(vocabulary=VOCABULARY, positions=POSITIONS, samples=SAMPLES, image=64, first_id=3)

_WIDTH = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 512}
_GROUPED = {**_WIDTH, "num_key_value_heads": 2}
_T5 = {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 6}


def _few() -> Batch:
    """A batch for models that copy weights for every token, or run position by position."""
    return {name: ids[:1, :16] for name, ids in SIZE.sequence_to_sequence().items()}


def _padded() -> Batch:
    mask = torch.ones(SAMPLES, POSITIONS, dtype=torch.long)
    mask[0, POSITIONS // 2 :] = 0
    return {**SIZE.sequence_to_sequence(), "attention_mask": mask}


def _llama() -> nn.Module:
    return model_families.llama(SIZE, **_GROUPED)


def _qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**SIZE.text, **_GROUPED, head_dim=32, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def _gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**SIZE.text, **_GROUPED, head_dim=32, sliding_window=32)
    return transformers.Gemma2ForCausalLM(config)


def _swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=5
        )
    )


def _mixtral(implementation: str) -> nn.Module:
    return model_families.mixtral(SIZE, implementation, **_GROUPED)


FAMILIES = (
    Family(name="llama", build=_llama, batch=SIZE.sequence_to_sequence, loss=own_loss),
    Family(name="llama-padded", build=_llama, batch=_padded, loss=own_loss),
    Family(name="qwen3-tied", build=_qwen3, batch=SIZE.sequence_to_sequence, loss=own_loss),
    Family(name="gemma2", build=_gemma2, batch=SIZE.sequence_to_sequence, loss=own_loss),
    Family(
        name="gpt2",
        build=lambda: model_families.gpt2(SIZE, 192, 3, 6),
        batch=SIZE.sequence_to_sequence,
        loss=own_loss,
    ),
    Family(name="bert", build=lambda: model_families.bert(SIZE, **_WIDTH), batch=SIZE.classified_text, loss=own_loss),
    Family(name="t5", build=lambda: model_families.t5(SIZE, **_T5), batch=SIZE.sequence_to_sequence, loss=own_loss),
    Family(name="vit", build=lambda: model_families.vit(SIZE, **_WIDTH), batch=SIZE.images, loss=own_loss),
    Family(name="swin", build=_swin, batch=SIZE.images, loss=own_loss),
    Family(
        name="mixtral-grouped",
        build=lambda: _mixtral("grouped_mm"),
        batch=SIZE.sequence_to_sequence,
        loss=own_loss,
    ),
    Family(name="mixtral-batched", build=lambda: _mixtral("batched_mm"), batch=_few, loss=own_loss),
    Family(name="mamba", build=lambda: model_families.mamba(SIZE, 256, 2, 16), batch=_few, loss=own_loss),
    Family(
        name="whisper",
        build=lambda: model_families.whisper(SIZE, width=192, layers=2, heads=6, inner=512, bins=40),
        batch=lambda: SIZE.sound(40),
        loss=own_loss,
    ),
    Family(
        name="lstm",
        build=lambda: Recurrent(SIZE, 192, tied=False),
        batch=lambda: {"ids": SIZE.ids(), "labels": SIZE.ids()},
        loss=class_loss,
        left_out=dict.fromkeys((Way.REENTRANT, Way.NON_REENTRANT), "an LSTM is one call"),
    ),
)

CONVOLUTIONS = (
    Family(
        name="convnet",
        build=lambda: ConvNet((3, 32, 32, 64, 64)),
        batch=lambda: SIZE.images("images"),
        loss=class_loss,
    ),
)
"""Models whose CPU kernels unfold their inputs, which torch tells no simulation: their peak on a CPU is not planned."""

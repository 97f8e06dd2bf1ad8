"""Models of a size at which weights and activations, not the scratch of CPU kernels, make the peak.

The families of `laws.families` again, ten to a hundred times as large: each step takes a fraction of a second.
"""

from __future__ import annotations

import torch
import transformers
from laws.families import Batch, Family, Way
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY = 2000
POSITIONS = 64
SAMPLES = 3

_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "use_cache": False}
_WIDTH = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 512}


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SAMPLES, POSITIONS))


def _causal() -> Batch:
    return {"input_ids": _ids(), "labels": _ids()}


def _few() -> Batch:
    """A batch for models that copy weights for every token, or run position by position."""
    return {name: ids[:1, :16] for name, ids in _causal().items()}


def _padded() -> Batch:
    mask = torch.ones(SAMPLES, POSITIONS, dtype=torch.long)
    mask[0, POSITIONS // 2 :] = 0
    return {**_causal(), "attention_mask": mask}


def _sequence() -> Batch:
    return {"input_ids": _ids(), "labels": torch.randint(0, 5, (SAMPLES,))}


def _images() -> Batch:
    return {"pixel_values": torch.randn(SAMPLES, 3, 64, 64), "labels": torch.randint(0, 5, (SAMPLES,))}


def _own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, **_WIDTH, num_key_value_heads=2))


def _qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**_TEXT, **_WIDTH, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def _gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**_TEXT, **_WIDTH, num_key_value_heads=2, head_dim=32, sliding_window=32)
    return transformers.Gemma2ForCausalLM(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=192, n_layer=3, n_head=6, use_cache=False
        )
    )


def _bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, num_labels=5, **_WIDTH)
    return transformers.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=192, d_kv=32, d_ff=512, num_layers=2, num_heads=6, decoder_start_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_WIDTH, image_size=64, patch_size=8, num_labels=5)
    )


def _swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=5
        )
    )


class Recurrent(nn.Module):
    """An LSTM over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 192)
        self.lstm = nn.LSTM(192, 192, num_layers=2, batch_first=True)
        self.head = nn.Linear(192, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


class ConvNet(nn.Module):
    """Convolutions with BatchNorm over images, checkpointed by block on demand."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 32), (32, 32), (32, 64), (64, 64))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
            for before, after in sizes
        )
        self.head = nn.Linear(64, 5)
        self._use_reentrant: bool | None = None

    def activation_checkpointing_enable(self, settings: dict[str, bool]) -> None:
        self._use_reentrant = settings["use_reentrant"]

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = pixel_values
        for position, block in enumerate(self.blocks):
            if self._use_reentrant is None or position == 0:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self._use_reentrant)
        return F.cross_entropy(self.head(hidden.mean((2, 3))), labels)


def _mixtral(implementation: str) -> nn.Module:
    config = transformers.MixtralConfig(**_TEXT, **_WIDTH, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation=implementation)


def _mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, state_size=16, use_cache=False
        )
    )


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
            decoder_attention_heads=6, encoder_ffn_dim=512, decoder_ffn_dim=512, num_mel_bins=40,
            max_source_positions=POSITIONS, max_target_positions=POSITIONS, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, use_cache=False,
        )
    )  # fmt: skip


FAMILIES = (
    Family(name="llama", build=_llama, batch=_causal, loss=_own_loss),
    Family(name="llama-padded", build=_llama, batch=_padded, loss=_own_loss),
    Family(name="qwen3-tied", build=_qwen3, batch=_causal, loss=_own_loss),
    Family(name="gemma2", build=_gemma2, batch=_causal, loss=_own_loss),
    Family(name="gpt2", build=_gpt2, batch=_causal, loss=_own_loss),
    Family(name="bert", build=_bert, batch=_sequence, loss=_own_loss),
    Family(name="t5", build=_t5, batch=lambda: {"input_ids": _ids(), "labels": _ids()}, loss=_own_loss),
    Family(name="vit", build=_vit, batch=_images, loss=_own_loss),
    Family(name="swin", build=_swin, batch=_images, loss=_own_loss),
    Family(name="mixtral-grouped", build=lambda: _mixtral("grouped_mm"), batch=_causal, loss=_own_loss),
    Family(name="mixtral-batched", build=lambda: _mixtral("batched_mm"), batch=_few, loss=_own_loss),
    Family(name="mamba", build=_mamba, batch=_few, loss=_own_loss),
    Family(
        name="whisper",
        build=_whisper,
        batch=lambda: {"input_features": torch.randn(SAMPLES, 40, 2 * POSITIONS), "labels": _ids()},
        loss=_own_loss,
    ),
    Family(
        name="lstm",
        build=Recurrent,
        batch=lambda: {"ids": _ids(), "labels": _ids()},
        loss=lambda model, batch: F.cross_entropy(model(batch["ids"]).flatten(0, -2), batch["labels"].flatten()),
        left_out=dict.fromkeys((Way.REENTRANT, Way.NON_REENTRANT), "an LSTM is one call"),
    ),
)

CONVOLUTIONS = (Family(name="convnet", build=ConvNet, batch=_images, loss=lambda model, batch: model(**batch)),)
"""Models whose CPU kernels unfold their inputs, which torch tells no simulation: their peak on a CPU is not planned."""

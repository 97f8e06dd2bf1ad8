"""A small language model on transformers' Llama, as a repository that is checked has it."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

LAYERS = 2


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = LlamaModel(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_hidden_layers=LAYERS,
                vocab_size=512,
            )
        )
        self.head = nn.Linear(64, 512, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutputWithPast:
        outputs = self.body(input_ids, use_cache=False)
        logits = self.head(outputs.last_hidden_state)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def build() -> nn.Module:
    return LanguageModel()


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.ones(4, 128, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}

"""The model of the engine tests: a small BERT with a head of an odd size, so that every engine has to pad."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification


def build_model() -> BertForSequenceClassification:
    """Returns the same model in every process and run."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=331,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def build_lora() -> PeftModel:
    """Returns the same model with adapters, which are trained with the classifier."""
    settings = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(build_model(), settings)


def batch(rank: int, number: int) -> dict[str, torch.Tensor]:
    """Returns a micro batch, another one on each rank."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return {
        "input_ids": torch.randint(0, 331, (2, 16), generator=generator),
        "labels": torch.randint(0, 3, (2,), generator=generator),
    }

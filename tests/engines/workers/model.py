"""The model of the engine tests: a small BERT with a head of an odd size, so that every engine has to pad."""

from __future__ import annotations

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
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


def build_qlora() -> PeftModel:
    """Returns the same with the encoder's layers in 4 bits, which the classifier is not: it is trained whole."""
    model = build_model().bfloat16()
    for layer in model.bert.encoder.modules():
        for name, child in layer.named_children():
            if isinstance(child, nn.Linear):
                quantised = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                quantised.load_state_dict(child.state_dict())
                setattr(layer, name, quantised.to("cpu"))
    settings = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, settings)


def batch(rank: int, number: int) -> dict[str, torch.Tensor]:
    """Returns a micro batch, another one on each rank."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return {
        "input_ids": torch.randint(0, 331, (2, 16), generator=generator),
        "labels": torch.randint(0, 3, (2,), generator=generator),
    }

"""Measurements that others have published with their whole configuration, and the plans of the same training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification, Qwen2Config

from memtrace.planning.optimizers.simulated import StepKernels, make_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.simulate import plan
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated
from memtrace.record.plan import Plan
from memtrace.record.units import GB, GIB, MIB
from memtrace.simulation.models.builds import BatchSettings, ModelSettings, make_inputs, make_labels

WITHIN = 0.05
"""A row with a larger error says why."""

Planned = Callable[[], int]
"""Returns bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published figure."""

    setup: str
    measured: float
    """In `unit`."""
    unit: str
    by: str
    """What was read, and what stands for it in the plan."""
    source: str
    """Where it was published."""
    planned: Planned
    why: str = ""
    """What else it counts, or what the plan does otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """A published figure and the plan of it."""

    published: Published
    planned: float
    """In the unit of the figure."""

    @property
    def error(self) -> float:
        """Planned over measured, minus 1."""
        return self.planned / self.published.measured - 1


UNITS = {"GB": GB, "GiB": GIB, "MiB": MIB}

_QWEN_SOURCE = "QwenLM/Qwen, README, Profiling of Memory and Speed"
_GUIDE_SOURCE = "transformers 4.21, guides Efficient Training on a Single GPU, Model training anatomy"
_HEAD_SOURCE = "huggingface/trl, pull request 6858"

_CONTEXT = "context of CUDA"
_GUIDE_CONTEXT = 1343 * MIB
"""What the guide reads on the same device before there is a model."""

_QWEN_CLASS = "class stands in"
_QWEN = {"7B": (4096, 11008, 32, 151936), "14B": (5120, 13696, 40, 152064)}
"""Width, width of the MLP, layers (with as many heads) and vocabulary."""
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
_QWEN_LORA = {"7B": (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), "14B": (34.6, 35.1, 35.3, 37.4, 42.5, 55.2)}
_QWEN_REASONS = {
    ("7B", 8192): "35.2 GB are allocated at the peak, and the plan's allocator keeps 3.8 GB more; from 4,096 tokens on "
    "7B grows by 6.9 GB in this table and 14B by 12.7, where the logits alone are the same",
}


def qwen(size: str, positions: int, recipe: str) -> Plan:
    """Returns the plan of a Qwen of the first generation with adapters of rank 64 on all linear layers.

    With two micro batches for the eight that were accumulated: from the second on nothing changes.
    """
    width, inner, layers, vocabulary = _QWEN[size]
    configuration = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=layers,
        num_key_value_heads=layers,
        tie_word_embeddings=False,
    )
    return plan_simulated(
        SimulationRequest(
            configuration=configuration,
            recipe=find_recipe(recipe),
            model=ModelSettings(adapter_rank=64, gradient_checkpointing=True),
            batch=BatchSettings(samples=1, positions=positions),
            accumulation_steps=2,
            by_module=False,
        )
    )


class SoftmaxOfTorch110(torch.autograd.Function):
    """The softmax of torch before 1.11, whose node keeps its input beside its result (pytorch issue 64000)."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        """Returns the softmax over the last dimension."""
        weights = scores.softmax(-1)
        ctx.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the input, which the input has no part in."""
        _, weights = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


def attention_of_torch_1_10(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over all positions."""
    weights = SoftmaxOfTorch110.apply(query @ key.transpose(-1, -2) * scaling)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("torch-1.10", attention_of_torch_1_10)


def bert(*, samples: int, accumulation_steps: int = 2, checkpointing: bool = False, optimizer: str = "adamw") -> Plan:
    """Returns the plan of BERT-large for classification, 512 tokens, in float32, as January 2022 trained it.

    With the softmax of torch 1.10, and a step without temporaries: the AdamW of transformers went from parameter to
    parameter. Without accumulation, too, there are gradients from the first step on: `zero_grad()` filled them with
    zeros before torch 2.0. A second micro batch stands for that.
    """
    configuration = BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        attn_implementation="torch-1.10",
    )

    def make_model() -> nn.Module:
        model = BertForSequenceClassification(configuration)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    batch = BatchSettings(samples=samples, positions=512)
    inputs = make_inputs(BertForSequenceClassification, configuration, batch, torch.float32)
    labels = make_labels(BertForSequenceClassification, configuration, batch)
    return plan(
        make_model,
        lambda: inputs | labels,
        optimizer=make_optimizer("adamw", StepKernels.FUSED) if optimizer == "adamw" else optimizer,
        accumulation_steps=accumulation_steps,
    )


class Head(nn.Module):
    """A head of 248,320 words over 16,384 tokens of 2048 channels, and its loss in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2048, 248_320, bias=False)
        self.tokens = nn.Parameter(torch.empty(16_384, 2048))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the loss; the logits are let go."""
        return F.cross_entropy(self.head(self.tokens).float(), labels)


def head() -> int:
    """Returns the peak of a forward and a backward pass with gradients from the one before: no step drops them."""
    return plan(
        Head,
        lambda: torch.empty(16_384, dtype=torch.long, device="meta"),
        recipe="pure-bf16",
        optimizer="sgd",
        accumulation_steps=2,
        device="H100-80GB",
    ).total_bytes


def _reserved(make: Callable[[], Plan], context: int = 0) -> int:
    reserved = make().reserved_bytes
    assert reserved is not None
    return reserved + context


def _adafactor_saves() -> int:
    return bert(samples=4).total_bytes - bert(samples=4, optimizer="adafactor").total_bytes


def _qwen_rows(recipe: str, title: str, figures: dict[str, tuple[float, ...]]) -> Iterator[Published]:
    for size, measured in figures.items():
        for positions, figure in zip(_LENGTHS, measured, strict=True):
            yield Published(
                setup=f"Qwen-{size}, {title} of rank 64 on all linear layers, checkpointing, batch 1, accumulated 8 "
                f"times, {positions:,} tokens, A100",
                measured=figure,
                unit="GB",
                by="NVML; reserved",
                source=_QWEN_SOURCE,
                planned=partial(_reserved, partial(qwen, size, positions, recipe)),
                why="; ".join(filter(None, (_CONTEXT, _QWEN_CLASS, _QWEN_REASONS.get((size, positions))))),
            )


LORA = tuple(_qwen_rows("lora", "LoRA", _QWEN_LORA))

QUANTIZED: Sequence[Published] = ()
"""Rows with a base in 4 bits come here: `_qwen_rows("qlora", "QLoRA", {"7B": (...)})`."""

_OLD_CODE = "planned as torch 1.10 trained it: softmax keeps its input, `zero_grad()` keeps gradients"

OTHERS = (
    Published(
        setup="Linear head, 2048 x 248,320, 16,384 tokens, bfloat16, cross entropy in float32, forward and backward "
        "pass, H100",
        measured=47.55,
        unit="GiB",
        by="torch; allocated at the peak",
        source=_HEAD_SOURCE,
        planned=head,
        why="gradients of the pass before are still there",
    ),
    *(
        Published(
            setup=f"BERT-large, classification, 512 tokens, float32, {title}, V100",
            measured=measured,
            unit="MiB",
            by="NVML; reserved and the 1,343 MiB of an empty process",
            source=_GUIDE_SOURCE,
            planned=partial(_reserved, make, _GUIDE_CONTEXT),
            why=why,
        )
        for title, measured, make, why in (
            ("batch 4", 14949, partial(bert, samples=4), _OLD_CODE),
            ("batch 1, accumulated 4 times", 8681, partial(bert, samples=1, accumulation_steps=4), _OLD_CODE),
            (
                "batch 1, accumulated 4 times, checkpointing",
                6775,
                partial(bert, samples=1, accumulation_steps=4, checkpointing=True),
                _OLD_CODE,
            ),
            ("batch 4, Adafactor", 12295, partial(bert, samples=4, optimizer="adafactor"), _OLD_CODE),
        )
    ),
    Published(
        setup="BERT-large as above, batch 4: what Adafactor saves beside AdamW",
        measured=14949 - 12295,
        unit="MiB",
        by="NVML; allocated at the peak",
        source=_GUIDE_SOURCE,
        planned=_adafactor_saves,
        why="two moments for each of 335 million parameters",
    ),
)

PUBLISHED: Sequence[Published] = (*LORA, *QUANTIZED, *OTHERS)


def compare(published: Published) -> PublishedRow:
    """Returns a figure beside its plan."""
    return PublishedRow(published=published, planned=published.planned() / UNITS[published.unit])

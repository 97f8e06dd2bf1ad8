"""What fine-tunes put around a model: recomputing, offloading, compiling, sharing; one process, from birth."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memtrace.config import TracerConfig
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.sources.autograd_torch_private import tells_of_nodes
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

WIDTH, LAYERS, ROWS, STEPS = 64, 3, 256, 3
MATRIX_PRODUCTS = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default}


def keep_matrix_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Saves what is dear to compute, and computes the rest again."""
    return CheckpointPolicy.MUST_SAVE if operator in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def plainly(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return block(hidden)


def selectively(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    contexts = partial(create_selective_checkpoint_contexts, keep_matrix_products)
    return checkpoint(block, hidden, use_reentrant=False, context_fn=contexts)


class Stack(nn.Module):
    """Blocks of a transformer's feed-forward part, each called in a way; with `shared` one block many times."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor], *, shared: bool = False) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH))
            for _ in range(1 if shared else LAYERS)
        ]
        self.blocks = nn.ModuleList(blocks * LAYERS if shared else blocks)
        self._call = call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = hidden + self._call(block, hidden)
        return hidden


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager[Any]]]] = {
    "plain": (partial(Stack, plainly), nullcontext),
    "selective checkpointing": (partial(Stack, selectively), nullcontext),
    "offload": (partial(Stack, plainly), save_on_cpu),
    "shared": (partial(Stack, plainly, shared=True), nullcontext),
    "compiled": (partial(Stack, plainly), nullcontext),
}


def train(way: str, *, watched: bool) -> tuple[nn.Module, list[float], StepRecord | None]:
    """Returns the model, its losses, and the last traced record of a run that was watched from birth."""
    build, around = WAYS[way]
    source = CpuEvents()
    if watched:
        source.open()
    torch.manual_seed(0)
    model = build()
    if way == "compiled":
        model.compile(backend="inductor")
    optimizer = torch.optim.AdamW(model.parameters())
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)
    tracer = Tracer(model, optimizer, config, source=source) if watched else nullcontext()
    losses = []
    with tracer:
        for step in range(STEPS):
            if watched and step == STEPS - 1:
                tracer.trace_next()
            with around():
                loss = model(torch.randn(ROWS, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    record = next(record for record in reversed(tracer.history) if record.traced) if watched else None
    return model, losses, record


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[nn.Module, list[float], StepRecord]]:
    return {way: train(way, watched=True) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same(runs, way):
    """Losses and weights have the bits of the run without memtrace."""
    model, losses, _ = train(way, watched=False)
    assert runs[way][1] == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), runs[way][0].parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_categories_add_up_and_nothing_is_left(runs, way):
    """Law 1 at every moment; at the peak at most 1 % that nobody claims."""
    _, _, record = runs[way]
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
    peak = record.moments[Moment.PEAK]
    assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


@pytest.mark.parametrize("way", WAYS)
def test_what_lasts_has_its_closed_form(runs, way):
    """Four bytes a parameter for weights and gradients, eight for the moments; a shared block counts once."""
    model, _, record = runs[way]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    moment = record.moments[Moment.BACKWARD_END]
    assert moment[Category.WEIGHTS] == 4 * parameters
    assert moment[Category.GRADIENTS] == 4 * parameters
    steps = 4 * len(list(model.parameters()))
    assert moment[Category.OPTIMIZER_STATE] == 8 * parameters + steps


def held_for_backward(record: StepRecord) -> int:
    """Bytes that the forward pass leaves to the backward pass."""
    moment = record.moments[Moment.FORWARD_END]
    return moment[Category.ACTIVATIONS] + moment[Category.TEMPORARIES]


def test_selective_checkpointing_keeps_the_matrix_products(runs):
    """Of each block two products; a checkpoint keeps them where no hook of autograd sees them: known by their life.

    So are its own inputs where torch tells of nodes, since they belong to none; of the first block they are the batch.
    """
    plain, selective = runs["plain"][2], runs["selective checkpointing"][2]
    kept = 4 * ROWS * (4 * WIDTH + WIDTH) * LAYERS
    inputs = 4 * ROWS * WIDTH * (LAYERS - 1) if tells_of_nodes() else 0
    moment = selective.moments[Moment.FORWARD_END]
    assert kept + inputs <= moment.entries[EntryKey(Category.ACTIVATIONS, "", "")] <= kept * 1.1 + inputs
    assert held_for_backward(selective) < held_for_backward(plain)


def test_offloaded_activations_are_where_the_offload_put_them(runs):
    """On a CPU the copies stay on the device: they are the activations. What a loss outside the model saves is not
    seen: memtrace's hooks lie over those of the offload, and must come off before its `with` block ends."""
    plain, offload = runs["plain"][2].moments[Moment.FORWARD_END], runs["offload"][2].moments[Moment.FORWARD_END]
    of_the_loss = 4 * ROWS * WIDTH
    assert offload[Category.ACTIVATIONS] == plain[Category.ACTIVATIONS] - of_the_loss
    assert offload[Category.TEMPORARIES] <= plain[Category.TEMPORARIES] + of_the_loss


def test_a_compiled_model_saves_less(runs):
    """Inductor computes cheap parts again: its activations are seen, and are fewer."""
    activations = {way: runs[way][2].moments[Moment.FORWARD_END][Category.ACTIVATIONS] for way in ("plain", "compiled")}
    assert 0 < activations["compiled"] <= activations["plain"]

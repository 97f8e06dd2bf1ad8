"""Tensors that a Function of the user keeps on its `ctx` are activations, until the backward pass has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import EVERY_STEP, assert_law_1, born
from torch import nn

from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

WIDTH, ROWS = 16, 64
KEPT = ROWS * WIDTH * 4
"""Bytes of what one Function keeps."""


class OnCtx(torch.autograd.Function):
    """Keeps three tensors that no operator saves, in three ways; torch frees none of them with the graph's own."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.one, ctx.some, ctx.named = rows.sin(), [rows.cos()], {"third": rows.exp()}
        ctx.beside = object()
        return rows * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.one * ctx.some[0] * ctx.named["third"]


class Saving(torch.autograd.Function):
    """Saves three tensors as torch wants it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows.sin(), rows.cos(), rows.exp())
        return rows * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        one, other, third = ctx.saved_tensors
        return gradient * one * other * third


class Layers(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.function.apply(self.first(rows)))


def dropped(model: nn.Module, rows: torch.Tensor) -> None:
    """The graph goes when the backward pass has ended, before the optimizer steps."""
    model(rows).square().mean().backward()


def kept(model: Any, rows: torch.Tensor) -> None:
    """The loop's loss keeps the graph, and what is on its `ctx`, until the next step has another one."""
    model.loss = model(rows).square().mean()
    model.loss.backward()


def traced(function: type[torch.autograd.Function], step: Callable[..., None]) -> StepRecord:
    """Returns the third step of a model whose window begins before it is built."""
    with born() as source:
        torch.manual_seed(0)
        model = Layers(function)
        optimizer = torch.optim.AdamW(model.parameters())
        with Tracer(model, optimizer, EVERY_STEP, source=source) as tracer:
            for _ in range(3):
                step(model, torch.randn(ROWS, WIDTH))
                optimizer.step()
                optimizer.zero_grad()
    assert_law_1(tracer.history)
    return tracer.history[-1]


@pytest.mark.parametrize("step", [dropped, kept], ids=lambda step: step.__name__)
def test_what_is_kept_on_ctx_counts_as_what_is_saved(step: Callable[..., None]) -> None:
    """Both are the same activations when the forward pass has ended. What is on the `ctx` of a graph that the loop
    keeps after the step is nobody's then."""
    record, other = traced(OnCtx, step), traced(Saving, step)
    for moment in (Moment.FORWARD_END, Moment.PEAK):
        assert record.moments[moment][Category.ACTIVATIONS] >= 3 * KEPT
    forward = Moment.FORWARD_END
    assert record.moments[forward][Category.ACTIVATIONS] == other.moments[forward][Category.ACTIVATIONS]
    left = (
        record.moments[Moment.STEP_END][Category.UNATTRIBUTED] - other.moments[Moment.STEP_END][Category.UNATTRIBUTED]
    )
    assert left == (3 * KEPT if step is kept else 0)

"""Who made the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.attribution.timeline import Lifetime, Timeline
from memtrace.planning.by_module import Holding, Makers, ModuleSpans, Span, activation_holders, holdings
from memtrace.planning.optimizers.simulated import StepKernels, make_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.simulated_run import Training, run_two_steps
from memtrace.record.categories import Category, Moment
from memtrace.simulation.kernels import Target
from memtrace.sources.events import Tag
from memtrace.sources.hooks import HookSet


def timeline(*made: tuple[int, str]) -> Timeline:
    """Blocks of ten bytes, each made at a time and tagged with a category."""
    lifetimes = [
        Lifetime(address, 10, address, begin_ns=time_ns, tag=Tag(Category(category), "", "float32"))
        for address, (time_ns, category) in enumerate(made)
    ]
    times = [time_ns for time_ns, _ in made]
    return Timeline(lifetimes=lifetimes, change_ns=times, totals=[10 * count for count in range(len(made) + 1)])


def test_a_block_belongs_to_the_innermost_module_that_ran() -> None:
    """Paths are joined over positions in lists; what is no activation is left out."""
    spans = [Span(1, "model"), Span(2, "layers.0.up"), Span(4, "model"), Span(5, "layers.1.up"), Span(7, "")]
    made = timeline((1, "activations"), (3, "activations"), (6, "activations"), (6, "weights"), (8, "activations"))
    assert activation_holders(made, Makers(spans), 9) == [
        Holding(name="layers.*.up", modules=2, nbytes=20),
        Holding(name="", modules=1, nbytes=10),
        Holding(name="model", modules=1, nbytes=10),
    ]


def test_only_what_is_alive_counts() -> None:
    """Blocks made later than the time, or freed before it, hold nothing then."""
    made = timeline((1, "activations"), (2, "activations"), (3, "activations"))
    made.lifetimes[0].end = 1
    assert activation_holders(made, Makers([Span(0, "model")]), 2) == [Holding(name="model", modules=1, nbytes=10)]


def test_spans_follow_calls_and_returns() -> None:
    """After a module has returned its caller runs again; a module that raises has returned, too."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.inner(features)

    ticks = iter(range(100))
    modules = ModuleSpans(lambda: next(ticks))
    outer = Outer()
    with HookSet() as hooks:
        modules.watch(outer, hooks)
        outer(torch.zeros(2))
        with pytest.raises(RuntimeError):
            outer(torch.zeros(3))
    assert [span.name for span in modules.spans] == ["Outer", "inner", "Outer", ""] * 2


def test_a_simulated_run_knows_who_made_its_activations() -> None:
    """The wide layer of a small network makes most of them, and all of them add up."""
    run = run_two_steps(
        Training(
            make_model=lambda: nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4)),
            make_batch=lambda: torch.zeros(8, 4),
            loss=lambda model, batch: F.mse_loss(model(batch), torch.zeros(8, 4)),
            recipe=find_recipe("fp32"),
            make_optimizer=make_optimizer("sgd", StepKernels.LOOP),
            accumulation_steps=1,
            target=Target.CPU,
        )
    )
    assert run.marks.forward_end_ns is not None
    holders = activation_holders(run.timeline, run.makers, run.marks.forward_end_ns)
    forward_end = {moment.value: breakdown for moment, breakdown in run.moments.items()}["forward_end"]
    assert sum(holding.nbytes for holding in holders) == forward_end[Category.ACTIVATIONS]
    assert {holding.name: holding.nbytes for holding in holders}["0"] == 8 * 64 * 4


class Mixed(torch.autograd.Function):
    """Returns its input; its backward pass makes a block of eight times the size."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.repeat(8, 1).view(8, *gradient.shape).sum(0)


class Mixing(nn.Module):
    """Goes through its own function within a checkpoint, so that its forward pass runs in the backward pass again."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 64, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: Mixed.apply(self.wide(x)).sin(), features, use_reentrant=False)


def test_blocks_of_the_backward_pass_belong_to_the_module_whose_forward_pass_made_the_node() -> None:
    """Also behind a checkpoint and in one's own functions; those of the loss and the optimizer are no module's."""
    run = run_two_steps(
        Training(
            make_model=lambda: nn.Sequential(nn.Linear(4, 64), nn.GELU(), Mixing(), nn.Linear(64, 4)),
            make_batch=lambda: torch.zeros(32, 4),
            loss=lambda model, batch: model(batch).exp().sum(),
            recipe=find_recipe("fp32"),
            make_optimizer=make_optimizer("adamw", StepKernels.LOOP),
            accumulation_steps=1,
            target=Target.CPU,
        )
    )
    wide = 32 * 64 * 4
    made: dict[tuple[str, int], int] = {}
    begin, end = run.marks.forward_end_ns, run.marks.backward_end_ns
    assert begin is not None and end is not None
    for life in run.timeline.lifetimes:
        if begin < life.begin_ns < end and life.address not in run.owners:
            key = run.makers.at(life.begin_ns), life.nbytes
            made[key] = made.get(key, 0) + 1
    assert made == {
        ("", 4): 2,  # the gradient that the pass begins with, and that of the sum
        ("", 32 * 4 * 4): 1,  # of exp
        ("3", wide): 1,
        ("2", wide): 3,  # the function's result a second time, and the gradients of sin and of the function
        ("2", 8 * wide): 1,
        ("2.wide", wide): 2,  # its result a second time, and its gradient
        ("1", wide): 1,
    }
    peak = holdings(run.timeline, run.marks, run.makers, run.owners)[Moment.PEAK]
    assert peak[Category.TEMPORARIES, "backward", ""]["2"] >= 8 * wide

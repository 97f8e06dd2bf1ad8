"""Scripted and jit-traced models: made beside every form of memtrace, and where they are what is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from laws.life import Perceptron
from torch import nn

from memtrace import MemTraceOptimizer
from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.record.limitations import Unseen
from memtrace.tracing.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}
ROWS = torch.ones(4, 16)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, ROWS)


WAYS = (scripted, traced)


def step(model: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    model(ROWS).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", WAYS)
def test_made_beside_a_wrapper_and_after_it(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """Between steps, inside a step, and when the wrapper is closed: the same code, the same values, each step seen."""
    model, bare = Perceptron(), make(Perceptron())
    settings = {**QUIET, "log_dir": tmp_path, "quiet": True, "trace_every": 1}
    optimizer = MemTraceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **settings)
    step(model, optimizer)
    between = make(model)
    step(model, optimizer)
    loss = model(ROWS).square().mean()
    inside = make(model)
    loss.backward()
    optimizer.step()
    step(model, optimizer)
    assert [record.batch.shape for record in optimizer.tracer.history if record.batch] == [(4, 16)] * 4
    assert all(record.traced for record in optimizer.tracer.history)
    optimizer.close()
    for made in (between, inside, make(model)):
        assert made.code == bare.code
        assert torch.equal(made(ROWS), model(ROWS))
        assert not made._forward_hooks
        assert not made._forward_pre_hooks


@pytest.mark.parametrize("trace_every", [1, 0])
def test_a_scripted_model_is_watched_as_any_other(trace_every: int) -> None:
    """Steps with their batch, weights, gradients and, traced, activations."""
    model = torch.jit.script(Perceptron())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, TracerConfig(**QUIET, trace_every=trace_every)) as tracer:
        for _ in range(4):
            step(model, optimizer)
    record = tracer.history[-1]
    assert len(tracer.history) == 4
    assert record.batch is not None
    assert record.traced == bool(trace_every)
    assert record.moments[Moment.STEP_END][Category.WEIGHTS] == sum(p.nbytes for p in model.parameters())
    assert not trace_every or record.moments[Moment.PEAK][Category.GRADIENTS] > 0
    assert tracer.snapshot().not_seen == ()


@pytest.mark.parametrize("make", WAYS)
def test_that_another_form_of_the_model_is_trained_is_said(
    make: Callable[[nn.Module], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its forward passes are not the watched model's: steps are counted, one line and a metric say what is missing."""
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "memtrace"), Tracer(model, optimizer, TracerConfig(**QUIET)) as tracer:
        step(model, optimizer)
        other = make(model)
        for _ in range(5):
            step(other, optimizer)
    assert tracer.snapshot().totals.steps == 6
    assert tracer.snapshot().not_seen == (Unseen.FORWARD,)
    assert len(caplog.records) == 1


def odd() -> nn.Module:
    """Returns a model of a class of its own that `torch.jit.script` cannot compile: torch remembers such classes."""

    class Odd(Perceptron):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(*[rows])

    return Odd()


def test_what_cannot_be_scripted_raises_as_without_memtrace() -> None:
    """With the same words, and the model is watched as before."""
    with pytest.raises(RuntimeError) as bare:
        torch.jit.script(odd())
    model = odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, TracerConfig(**QUIET, trace_every=1)) as tracer:
        with pytest.raises(RuntimeError) as watched:
            torch.jit.script(model)
        step(model, optimizer)
    assert str(watched.value) == str(bare.value)
    assert [record.traced for record in tracer.history] == [True]


def test_a_model_that_is_compiled_as_a_whole_is_scripted_again_and_again() -> None:
    """What is compiled stays as it is: to compile it anew each time would end in an error, after eight times."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with Tracer(model, optimizer, TracerConfig(**QUIET)):
        for _ in range(3):
            step(compiled, optimizer)
            scripted(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

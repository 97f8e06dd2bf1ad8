"""Law 5 for compiled models: memtrace's hooks stay outside the graph, and the results are the same bits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.utils  # what compiles a model has loaded it before a tracer is attached
from torch import nn

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.body(batch) * 2


def graphs() -> int:
    """Returns how many graphs were compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(how: str, *, traced: bool) -> tuple[list[float], list[int], Tracer | None]:
    """Returns the losses, the graphs compiled up to the end of each step, and the tracer; every other one is traced."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    called: nn.Module = model
    if how == "in place":
        model.compile()
    elif how == "wrapped":
        called = torch.compile(model)
    tracer = Tracer(model, optimizer, TracerConfig(strict=True, trace_every=2)) if traced else None
    if tracer is not None:
        tracer.attach()
    if how == "after attach":  # any optimizer has loaded the compiler before that
        model.compile()
    losses, compiled = [], []
    for _ in range(4):
        loss = called(torch.randn(16, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        compiled.append(graphs())
    if tracer is not None:
        tracer.detach()
    return losses, compiled, tracer


@pytest.mark.parametrize("how", ["in place", "wrapped", "after attach"])
def test_compiled_model_trains_the_same_and_is_seen(how: str) -> None:
    """Traced and counted steps in turn: activations are seen, no loss differs in a bit, no step compiles anew."""
    bare, _, _ = train(how, traced=False)
    losses, compiled, tracer = train(how, traced=True)
    assert losses == bare
    assert compiled[0] > 0
    assert compiled == compiled[:1] * 4
    assert tracer is not None
    assert {record.traced for record in tracer.history} == {True, False}
    for record in tracer.history:
        if record.traced:
            assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
            assert record.moments[Moment.PEAK].total_bytes == record.moments[Moment.PEAK].allocated_bytes


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        forces = torch.func.vmap(torch.func.grad(lambda row: self.body(row).sum()))
        return self.body(rows) + forces(rows)


@pytest.mark.parametrize("by_itself", [True, False], ids=["compiled in place", "inside a compiled caller"])
def test_a_compiled_model_that_uses_torch_func(by_itself: bool) -> None:
    """It is compiled within a traced step, where hooks are on that torch forbids there: the same graphs and losses."""

    def train(config: TracerConfig | None) -> tuple[list[float], list[int], list[bool]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Forces()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if by_itself:
            model.compile(backend="aot_eager")

        def caller(rows: torch.Tensor) -> torch.Tensor:
            return model(rows)

        called = model if by_itself else torch.compile(caller, backend="aot_eager")
        losses, compiled = [], []
        tracer = Tracer(model, optimizer, config)
        with nullcontext() if config is None else tracer:
            for _ in range(4):
                loss = called(torch.randn(16, 32)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                compiled.append(graphs())
        return losses, compiled, [record.traced for record in tracer.history]

    bare_losses, bare_graphs, _ = train(None)
    for trace_every in (1, 2):
        losses, compiled, traced = train(TracerConfig(strict=True, trace_every=trace_every, port=None, step_log=False))
        assert losses == bare_losses
        assert compiled == bare_graphs
        assert traced == [trace_every == 1 or bool(step % 2) for step in range(4)]


@pytest.mark.parametrize("trace_every", [1, 0])
def test_a_compiled_step_of_an_optimizer_is_one_graph(trace_every: int) -> None:
    """As without memtrace, whose own functions the compiler does not look into; each step has its record."""

    def run(config: TracerConfig | None) -> tuple[list[torch.Tensor], int, int]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager")
        with nullcontext() if config is None else Tracer(model, optimizer, config) as tracer:
            for _ in range(6):
                model(torch.randn(16, 32)).square().mean().backward()
                step()
                optimizer.zero_grad()
        steps = 6 if tracer is None else len(tracer.history)
        return [parameter.detach() for parameter in model.parameters()], graphs(), steps

    bare, watched = run(None), run(TracerConfig(strict=True, trace_every=trace_every))
    assert all(torch.equal(one, other) for one, other in zip(bare[0], watched[0], strict=True))
    assert watched[1:] == bare[1:] == (1, 6)


def train_with_compiled_autograd(*, traced: bool, fullgraph: bool) -> tuple[list[torch.Tensor], Tracer]:
    """Returns the parameters after three steps whose backward pass the compiler has taken in, and the tracer."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracer = Tracer(model, optimizer, TracerConfig(strict=True, trace_every=1))
    if traced:
        tracer.attach()
    for _ in range(3):
        loss = model(torch.randn(16, 32)).square().mean()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=fullgraph)):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tracer.detach()
    return [parameter.detach() for parameter in model.parameters()], tracer


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_autograd(fullgraph: bool) -> None:
    """The compiler goes through the hooks on saved tensors, where a version is no number: values are the same."""
    bare, _ = train_with_compiled_autograd(traced=False, fullgraph=fullgraph)
    values, tracer = train_with_compiled_autograd(traced=True, fullgraph=fullgraph)
    assert all(map(torch.equal, values, bare))
    assert [record.traced for record in tracer.history] == [True] * 3
    for record in tracer.history:
        assert record.moments[Moment.PEAK][Category.ACTIVATIONS] > 0

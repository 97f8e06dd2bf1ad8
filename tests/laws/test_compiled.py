"""Law 5 for compiled models: memtrace's hooks stay outside the graph, and the results are the same bits."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo  # what compiles a model has loaded it before a tracer is attached
from torch import nn

from memtrace.categories import Category, Moment
from memtrace.config import TracerConfig
from memtrace.tracer import Tracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.body(batch) * 2


def train(how: str, *, traced: bool) -> tuple[list[float], Tracer | None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    called: nn.Module = model
    if how == "in place":
        model.compile()
    elif how == "wrapped":
        called = torch.compile(model)
    tracer = Tracer(model, optimizer, TracerConfig(strict=True, trace_every=1)) if traced else None
    if tracer is not None:
        tracer.attach()
    if how == "after attach":  # any optimizer has loaded the compiler before that
        model.compile()
    losses = []
    for _ in range(3):
        loss = called(torch.randn(16, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if tracer is not None:
        tracer.detach()
    return losses, tracer


@pytest.mark.parametrize("how", ["in place", "wrapped", "after attach"])
def test_compiled_model_trains_the_same_and_is_seen(how: str) -> None:
    """Every step is traced, with its activations, and no loss differs in a bit."""
    bare, _ = train(how, traced=False)
    losses, tracer = train(how, traced=True)
    assert losses == bare
    assert tracer is not None
    assert [record.traced for record in tracer.history] == [True] * 3
    for record in tracer.history:
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
        assert record.moments[Moment.PEAK].total_bytes == record.moments[Moment.PEAK].allocated_bytes

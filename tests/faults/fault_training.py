"""The training of every row of the fault table: the same bytes in the end, whatever happens to memtrace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

STEPS = 6

Attach = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[object]]


class Net(nn.Module):
    """A small model with the things that hooks meet: a norm with buffers, a tied weight, a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)
        self.last.weight = nn.Parameter(self.first.weight.detach().t().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu()
        hidden = hidden + torch.tanh(self.second(hidden))
        return (self.last(hidden) - x).square().mean()


def make() -> tuple[Net, torch.optim.Optimizer]:
    """Returns the model and its optimizer, the same each time."""
    torch.manual_seed(3)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batches(steps: int = STEPS) -> list[torch.Tensor]:
    """Returns the batches, the same each time."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 16, generator=generator) for _ in range(steps)]


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[torch.Tensor]) -> None:
    """Trains one step on each batch, in two micro batches."""
    for row in rows:
        optimizer.zero_grad()
        for micro_batch in row.chunk(2):
            model(micro_batch).backward()
        optimizer.step()


def train(attach: Attach = lambda model, optimizer: nullcontext(), steps: int = STEPS) -> list[torch.Tensor]:
    """Trains under what `attach` returns, and returns the final parameters and buffers."""
    model, optimizer = make()
    with attach(model, optimizer):
        run_steps(model, optimizer, batches(steps))
    return state_of(model)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    """Returns what a checkpoint of the model would hold."""
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def assert_same(state: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Asserts that two runs have ended with the same bits."""
    assert len(state) == len(expected)
    for left, right in zip(state, expected, strict=True):
        assert torch.equal(left, right)

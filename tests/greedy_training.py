"""A small training whose allocations fail for real, in the forward pass, in the backward pass or in the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrace.record.oom.document import parse_report
from memtrace.record.oom.report import OomReport
from memtrace.record.strict_json import parse_json

HUGE = 1 << 50
"""More bytes than any machine can give."""

PLACES = ("forward", "backward", "optimizer")


def ask_for_too_much() -> None:
    """Asks torch's CPU allocator for memory that it cannot have."""
    torch.empty(HUGE, dtype=torch.uint8)


class GreedyGradient(torch.autograd.Function):
    """The identity, whose gradient needs too much memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        ask_for_too_much()
        return gradient


class Greedy(nn.Module):
    """A layer that may need too much memory in the forward or in the backward pass."""

    fails_in: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails_in == "forward":
            ask_for_too_much()
        return GreedyGradient.apply(x) if self.fails_in == "backward" else x


class GreedyAdamW(torch.optim.AdamW):
    """AdamW whose step may need too much memory."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.fails:
            ask_for_too_much()
        return super().step(closure)


class GreedyModel(nn.Module):
    """Four layers, the third followed by a greedy one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.greedy = Greedy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            x = layer(x).relu()
            if at == 2:
                x = self.greedy(x)
        return x.square().mean()


class Training:
    """The loop: `step()` trains one step; from `fail(place)` on it runs out of memory there."""

    def __init__(self) -> None:
        self.model = GreedyModel()
        self.optimizer: torch.optim.Optimizer = GreedyAdamW(self.model.parameters(), lr=0.01)
        self.greedy_optimizer = self.optimizer
        torch.manual_seed(5)

    def fail(self, place: str | None) -> None:
        self.model.greedy.fails_in = place
        self.greedy_optimizer.fails = place == "optimizer"

    def step(self) -> None:
        self.model(torch.randn(8, 32)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def reports_in(directory: Path) -> list[OomReport]:
    """Returns the reports of a run, the oldest first."""
    return [
        parse_report(parse_json(path.read_bytes(), path.name), path.name)
        for path in sorted(directory.rglob("oom-rank*.json"))
    ]

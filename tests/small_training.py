"""A small model, one step of its training, and a tracer whose records obey law 1."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

EVERY_STEP = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)
ON_DEMAND = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=0)
ROWS, WIDTH, CLASSES = 6, 16, 10
FLOAT = 4
LARGE = 40 << 20
"""A size that the C library asks the system for, and gives back to it, each time. Never touched, it costs nothing."""


class Net(nn.Module):
    """A hidden layer, a middle that uses one layer twice and can be checkpointed, and a head."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(rows))
        if self.use_reentrant is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.use_reentrant)
        return self.head(hidden)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.second(hidden))))


def make(kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, kind(model.parameters(), lr=0.01)


def batch(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(0, CLASSES, (rows,))


def loss_of(model: nn.Module, rows: int = ROWS) -> torch.Tensor:
    inputs, labels = batch(rows)
    return F.cross_entropy(model(inputs), labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = ROWS) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, rows)
    loss.backward()
    optimizer.step()
    return loss.item()


def empty_at(address: int, nbytes: int) -> torch.Tensor:
    """Returns a tensor at an address that was just given back; other gaps of that size are filled first."""
    fillers = []
    for _ in range(64):
        tensor = torch.empty(nbytes, dtype=torch.uint8)
        if tensor.data_ptr() == address:
            return tensor
        fillers.append(tensor)
    raise AssertionError("the address has not come back")


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_law_1(records: Sequence[StepRecord]) -> None:
    """The categories add up to what was allocated, at every moment of every traced step."""
    assert any(record.traced for record in records)
    for record in records:
        for moment, breakdown in record.moments.items():
            if record.traced:
                assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)


@contextlib.contextmanager
def traced(model: nn.Module, optimizers: Any, config: TracerConfig = EVERY_STEP, **settings: Any) -> Iterator[Tracer]:
    """A tracer whose records obey law 1."""
    with Tracer(model, optimizers, config, **settings) as tracer:
        yield tracer
    assert_law_1(tracer.history)


@contextlib.contextmanager
def born() -> Iterator[CpuEvents]:
    """A source that is open before anything is built."""
    gc.collect()
    source = CpuEvents()
    assert source.open()
    yield source
    source.abandon()

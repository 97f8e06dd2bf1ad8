"""Law 12: what memtrace cannot see it says, once, in the log and in a metric; and where it sees all it says nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from prometheus_client import generate_latest
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.attribution import scan
from memtrace.config import TracerConfig
from memtrace.exporters.prometheus import registry_of
from memtrace.record.breakdown import AllocatorReading
from memtrace.record.limitations import Unseen
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window
from memtrace.tracing.tracer import Tracer

CONFIG = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)
ROWS = torch.ones(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.loss(rows)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows).square().mean()

    def without_modules(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.layers[0].weight).square().mean()


class Lossy(CpuEvents):
    """Its windows always lack some events."""

    def close(self) -> Window:
        return replace(super().close(), complete=False)


class Small(CpuEvents):
    """Has room for nothing."""

    def fits(self, allocations: int) -> bool:
        return False

    def reading(self) -> AllocatorReading | None:
        self.counted = getattr(self, "counted", 0) + 1
        return AllocatorReading(allocated_bytes=0, reserved_bytes=0, allocations=self.counted)


def steps(call: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        call(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()


def as_usual(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model, optimizer, 6)


def by_another_method(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model.loss, optimizer, 6)


def by_no_module(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model.without_modules, optimizer, 6)


def checkpointed_whole(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    def call(rows: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, rows.clone().requires_grad_(), use_reentrant=True)

    with tracer:
        steps(call, optimizer, 6)


def compiled_before(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    caller = torch.compile(lambda rows: 2 * model(rows), backend="eager")
    steps(caller, optimizer, 1)
    with tracer:
        steps(caller, optimizer, 6)


def by_another_optimizer(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model, optimizer, 2)
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 520)


def many_steps(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model, optimizer, 2**8 + 10)


def on_two_devices(model: Model, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
    with tracer:
        steps(model, optimizer, 3)


def spread(patch: pytest.MonkeyPatch) -> None:
    """Says of a model that a part of it is on a second device, which a machine without one cannot have."""
    whole = scan.devices_of
    patch.setattr(scan, "devices_of", lambda model: {**whole(model), torch.device("cuda", 1): 1})


ADVICE = {
    Unseen.FORWARD: "attach it before the function is compiled",
    Unseen.STEP_END: "attach memtrace to that one",
    Unseen.DEVICE: "others may run out of memory before it",
    Unseen.TRACE: ("trace_next() tries again", "`memtrace plan` says what they are"),
}
"""What a line says that one can do."""

WAYS = {
    "as usual": (as_usual, CpuEvents, ()),
    "by another method": (by_another_method, CpuEvents, ()),
    "by no module": (by_no_module, CpuEvents, (Unseen.FORWARD,)),
    "whole in a reentrant checkpoint": (checkpointed_whole, CpuEvents, ()),
    "compiled before attach": (compiled_before, CpuEvents, (Unseen.FORWARD,)),
    "by another optimizer": (by_another_optimizer, CpuEvents, (Unseen.STEP_END,)),
    "on two devices": (on_two_devices, CpuEvents, (Unseen.DEVICE,)),
    "windows are lost": (many_steps, Lossy, (Unseen.TRACE,)),
    "no room for a micro batch": (many_steps, Small, (Unseen.TRACE,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_seen_is_said_once(
    way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names it and what to do, one series; memtrace stays up, and every optimizer step that it knows of
    is counted."""
    run, source, expected = WAYS[way]
    if Unseen.DEVICE in expected:
        spread(monkeypatch)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    tracer = Tracer(model, optimizer, CONFIG, source=source())
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        run(model, optimizer, tracer)
    snapshot = tracer.snapshot()
    assert snapshot.not_seen == expected
    assert snapshot.up
    assert len(caplog.records) == len(expected)
    for unseen, told in zip(expected, caplog.messages, strict=True):
        advice = ADVICE[unseen]
        assert any(one in told for one in ((advice,) if isinstance(advice, str) else advice))
    exposition = generate_latest(registry_of(lambda: snapshot)).decode()
    series = [line for line in exposition.splitlines() if line.startswith("memtrace_not_seen{")]
    assert len(series) == len(expected)
    assert all(f'what="{unseen.value}"' in line for unseen, line in zip(expected, series, strict=True))

"""What memtrace takes in a counted step, with what a recorded device said."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn

PARAMETERS = 300
STEPS = 400
BLOCK = 50
"""Steps whose median is one repetition."""
SECONDS = 0.0002
RECORDED = Path(__file__).parents[1] / "tests" / "fixtures" / "gpu" / "llama-3-8b" / "steps-rank0.jsonl"
"""Its last step is a counted one: the readings are those of an H200 in it."""


class Layers(nn.Module):
    """A model of so many parameters, of which the forward pass uses all or the first two."""

    def __init__(self, *, used: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(PARAMETERS // 2)])
        self._used = used

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers[: self._used // 2](batch)
        return output


class Waiting(torch.optim.AdamW):
    """AdamW whose updates are the device's work: here none is done once there is state."""

    def step(self, closure: Any = None) -> Any:
        return None if self.state else super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def counted() -> list[dict[str, Any]]:
    """Seconds that memtrace takes in a counted step, its line in the step log included, in two loops.

    Both have the readings of the allocator and of the driver that an H200 gave in a step of Llama-3-8B; to ask torch
    for the former is not in it, the latter are asked for on memtrace's own thread. The first loop calls the model, runs
    backward and steps an optimizer, and computes next to nothing in between, as where a device computes. In the second
    the processor computes all of it, and in each step memtrace finds its caches full of the training's.
    """
    what = f"a counted step with {PARAMETERS} parameters, counters of a recorded device"
    return [
        {"what": what, **_taken(Layers(used=2), Waiting), "bound": SECONDS},
        {
            "what": f"a counted step where the processor trains {PARAMETERS} parameters in between",
            **_taken(Layers(used=PARAMETERS), torch.optim.AdamW),
            "bound": None,
        },
    ]


def _taken(model: nn.Module, make: type[torch.optim.AdamW]) -> dict[str, Any]:
    from memtrace import MemoryTracer, TracerConfig
    from memtrace.record.breakdown import AllocatorReading, DeviceReading
    from memtrace.record.categories import Moment
    from memtrace.record.schema import parse_step
    from memtrace.sources.cpu import CpuEvents
    from memtrace.tracing import watch

    lines = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    recorded = parse_step(lines[-1], str(RECORDED))
    assert recorded.allocator is not None and recorded.device_memory is not None
    device = replace(recorded.device_memory, non_torch_bytes=None, free_and_reserved_bytes=None)
    begin, forward_end = recorded.moments[Moment.STEP_END], recorded.moments[Moment.FORWARD_END]
    asked = [found.allocated_bytes for found in (begin, forward_end, begin, begin)]
    readings = cycle(replace(recorded.allocator, requested_bytes=found) for found in asked)

    class WithCounters(CpuEvents):
        def reading(self) -> AllocatorReading:
            return next(readings)

    class Driver:
        def read(self) -> DeviceReading:
            return device

        def close(self) -> None:
            pass

    optimizer = make(model.parameters())
    batch = torch.ones(4, 8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(watch, "open_device", lambda *_: Driver()),
        mock.patch.object(watch, "refresh_of", lambda _: None),
    ):
        config = TracerConfig(port=0, log_dir=directory, strict=True, quiet=True, trace_every=0, history=STEPS)
        with MemoryTracer(model, optimizer, config, source=WithCounters()) as tracer:
            for _ in range(2 * STEPS):
                model(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            taken = [record.self_seconds for record in tracer.history]
    blocks = [median(taken[begin : begin + BLOCK]) for begin in range(0, STEPS, BLOCK)]
    return {"value": median(blocks), "least": min(blocks), "most": max(blocks), "repetitions": len(blocks), "unit": "s"}

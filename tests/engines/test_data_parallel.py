"""nn.DataParallel with a replica on the watched device and one on another, which on a CPU is `meta`.

Its forward pass and torch's replicas of modules are real; what needs two devices that compute (copies from one to the
other) is played. As in torch each replica runs on a thread of its own. What a thread allocates on a CPU, torch's
profiler tells that thread alone: to see activations, the watched replica runs where it is called as well.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_training import EVERY_STEP
from torch import nn

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

WIDTH, ROWS, STEPS = 64, 8, 4
DEVICES = (torch.device("cpu"), torch.device("meta"))
BY_DEFAULT = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0)


class OnTwoDevices(nn.DataParallel):
    """Gives half of the rows to each replica, and returns what the first one has made of its half."""

    def __init__(self, module: nn.Module, *, threads: int) -> None:
        super().__init__(module)
        self.threads = threads
        self.device_ids, self.output_device, self.src_device_obj = [0, 1], 0, DEVICES[0]

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        halves = zip(inputs[0].chunk(2), DEVICES, strict=True)
        return [(half.to(device),) for half, device in halves], [{}, {}]

    def replicate(self, module: nn.Module, device_ids: Any) -> list[nn.Module]:
        return [replica(module, device) for device in DEVICES]

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Any, kwargs: Any) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = [torch.empty(0)] * len(replicas)

        def work(number: int) -> None:
            outputs[number] = replicas[number](*inputs[number])

        for number in reversed(range(len(replicas))):
            if number < len(replicas) - self.threads:
                work(number)
                continue
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            thread.join()
        return outputs

    def gather(self, outputs: list[torch.Tensor], output_device: Any) -> torch.Tensor:
        return outputs[0]


def replica(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns what torch makes of each module, with copies on the device in the place of its parameters."""
    made = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(made, name, replica(child, device))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(made, name, parameter.view_as(parameter) if device == DEVICES[0] else parameter.to(device))
    return made


def train(config: TracerConfig | None, threads: int = 2) -> tuple[list[float], nn.Module, Sequence[StepRecord]]:
    torch.manual_seed(0)
    source = None
    if config is EVERY_STEP:
        source = CpuEvents()
        source.open()
    network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    model = OnTwoDevices(network, threads=threads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with Tracer(model, optimizer, config, source=source) if config else nullcontext() as tracer:
        for _ in range(STEPS):
            loss = model(torch.randn(2 * ROWS, WIDTH)).square().mean()
            loss.backward()
            losses.append(loss.item())
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return losses, model, [*tracer.history] if tracer else []


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("config", [EVERY_STEP, BY_DEFAULT], ids=["every step", "by default"])
def test_the_watched_device_is_followed(config: TracerConfig, threads: int) -> None:
    """Same bits, a step for each update, law 1; weights, gradients and state once; activations of its own replica."""
    plain, other, _ = train(None)
    losses, model, records = train(config, threads)
    assert losses == plain
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    assert [record.step for record in records] == [1, 2, 3, 4]
    traced = [record for record in records if record.traced]
    assert len(traced) == (STEPS if config is EVERY_STEP else 1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for record in traced:
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
            assert moment[Category.WEIGHTS] == weights
            assert moment[Category.UNATTRIBUTED] <= 64
        assert record.moments[Moment.BACKWARD_END][Category.GRADIENTS] == weights
        hidden, output = 4 * ROWS * 4 * WIDTH, 4 * ROWS * WIDTH
        kept = record.moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        assert kept == (2 * hidden + output if threads == 1 else 0)


def test_the_threads_are_let_go() -> None:
    """A tracer that was detached is on no replica of later steps."""
    _, model, _ = train(replace(BY_DEFAULT, trace_every=1))
    model(torch.randn(2 * ROWS, WIDTH)).square().mean().backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert copy.deepcopy(model)

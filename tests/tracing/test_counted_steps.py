"""A step that is not traced says what the ledger knows, and agrees with a traced one where it says anything."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import memtrace
from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.config import TracerConfig
from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Category, Moment
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

PACKAGE = str(Path(memtrace.__file__).parent)


def run_with_masters(*, zero_grad: bool) -> Tracer:
    """Four steps of a bfloat16 model with float32 master copies; the second one is traced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    with Tracer(model, optimizer, TracerConfig(strict=True, trace_every=0)) as tracer:
        for _ in range(4):
            model(torch.randn(4, 8, dtype=torch.bfloat16)).square().mean().backward()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    parameter.copy_(master)
            if zero_grad:
                optimizer.zero_grad()
                model.zero_grad()
    return tracer


def test_counted_step_end_agrees_with_the_traced_one() -> None:
    """Weights, masters, both kinds of gradients and the optimizer's state are the same, to the byte."""
    tracer = run_with_masters(zero_grad=True)
    counted, traced = tracer.history[-1], tracer.history[1]
    assert (counted.traced, traced.traced) == (False, True)
    for category in (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE):
        left, right = counted.moments[Moment.STEP_END], traced.moments[Moment.STEP_END]
        assert left[category] == right[category] > 0, category
    assert counted.moments[Moment.STEP_END][Category.GRADIENTS] == sum(3 * 2 * n for n in (8 * 16, 16, 16 * 4, 4))


def test_counted_step_does_not_claim_what_it_did_not_see() -> None:
    """On a CPU there is no counter: nothing follows the batch, no allocated total, and the breakdown says estimated."""
    counted = run_with_masters(zero_grad=False).history[-1]
    step_end = counted.moments[Moment.STEP_END]
    assert step_end.estimated
    assert step_end.allocated_bytes is None
    assert step_end[Category.ACTIVATIONS] == step_end[Category.TEMPORARIES] == step_end[Category.UNATTRIBUTED] == 0
    assert counted.device_memory.process_bytes > 0


def test_a_counted_step_calls_as_little_for_many_parameters_as_for_few() -> None:
    """What memtrace runs of its own in one does not grow with the model."""

    def calls(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        count = [0]

        def counting(frame: FrameType, event: str, argument: object) -> None:
            count[0] += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

        config = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=0)
        with Tracer(model, optimizer, config):
            for number in range(5):
                if number == 4:
                    sys.setprofile(counting)
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            sys.setprofile(None)
        return count[0]

    few, many = calls(40), calls(160)
    assert 0 < many <= few + 8


class _WithCounters(CpuEvents):
    """A CPU whose allocator has the counters of a device, the same at the end of each step."""

    def reading(self) -> AllocatorReading:
        return AllocatorReading(allocated_bytes=2 << 20, reserved_bytes=4 << 20, requested_bytes=2 << 20)


def test_a_counted_step_calls_little(tmp_path: Path) -> None:
    """With 300 parameters, counters, its record and its line in the step log."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(150)))
    optimizer = torch.optim.AdamW(model.parameters())
    called: list[str] = []

    def counting(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}")

    config = TracerConfig(strict=True, port=None, log_dir=str(tmp_path), trace_every=0, quiet=True)
    with MemoryTracer(model, optimizer, config, source=_WithCounters()) as tracer:
        for number in range(8):
            if number == 7:
                sys.setprofile(counting)
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        sys.setprofile(None)
        assert tracer.latest is not None and not tracer.latest.traced
    assert len((tmp_path / "steps-rank0.jsonl").read_text().splitlines()) == 8
    assert 100 < len(called) <= 320, sorted(called)
    assert not [name for name in called if name.startswith(("gradients.py:gradient_bytes", "held.py:have_gradients"))]


def test_gradients_that_come_and_go_are_counted_beside_counters() -> None:
    """Where as much is allocated as before they are not looked at; where another step ends with more, they are."""
    parameter_bytes = 4 * (4 * 4 + 4)
    held = [1000]

    class Counters(_WithCounters):
        def reading(self) -> AllocatorReading:
            return AllocatorReading(allocated_bytes=held[0], reserved_bytes=4 << 20, requested_bytes=held[0])

    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = TracerConfig(strict=True, port=None, step_log=False, trace_every=0)
    found = []
    with Tracer(model, optimizer, config, source=Counters()) as tracer:
        for kept in (True, True, True, False, False, True):
            model(torch.ones(1, 4)).sum().backward()
            if not kept:
                model.zero_grad()
            held[0] = 1000 + kept * parameter_bytes
            optimizer.step()
            found.append(tracer.latest.moments[Moment.STEP_END][Category.GRADIENTS])
            optimizer.zero_grad()
    assert found[2:] == [parameter_bytes, 0, 0, parameter_bytes]

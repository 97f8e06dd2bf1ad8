"""Very short steps: a sample of them has a record, all of them are counted, and what is new is not skipped.

A budget of 0 makes every step too short, whatever the machine: then records come with the traces, every ten steps.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import ROWS, WIDTH, loss_of, make, step, traced
from torch import nn
from torch.nn import functional as F

from memtrace import MemoryTracer
from memtrace.config import TracerConfig
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.breakdown import BatchShape
from memtrace.record.limitations import Unseen

SPARSE = TracerConfig(
    strict=True, port=None, step_log=False, device_poll_seconds=0, overhead_budget=0, max_trace_interval=10
)
AT_FIRST = list(range(1, 33))


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a second would pass before the next trace is due."""
    monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)


def test_all_steps_are_counted_and_a_sample_has_records(tmp_path: Path) -> None:
    """Numbers in history and log are the true ones; law 1 holds in the traced records."""
    model, optimizer = make()
    config = TracerConfig(strict=True, port=None, log_dir=tmp_path, overhead_budget=0, max_trace_interval=10)
    with MemoryTracer(model, optimizer, config) as tracer:
        for number in range(1, 61):
            step(model, optimizer)
            assert tracer.snapshot().totals.steps == number
        path = tracer.log_path
    assert path is not None
    assert [record.step for record in tracer.history] == [*AT_FIRST, 42, 52]
    assert [record.step for record in read_step_log(path)] == [*AT_FIRST, 42, 52]
    assert [record.step for record in tracer.history if record.traced] == [2, 12, 22, 32, 42, 52]


def test_a_larger_batch_is_not_passed_over() -> None:
    """It has a record of its own, and the next one comes when it would have come."""
    model, optimizer = make()
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 61):
            step(model, optimizer, rows=2 * ROWS if number in (45, 47) else ROWS)
    assert [record.step for record in tracer.history] == [*AT_FIRST, 42, 45, 52]


def test_a_trace_that_was_asked_for_is_not_passed_over() -> None:
    """Between two steps it is the next step; in the middle of one the step after it."""
    model, optimizer = make()
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 51):
            if number == 36:
                tracer.trace_next()
            loss = loss_of(model)
            if number == 40:
                tracer.trace_next()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.step for record in tracer.history if record.traced][4:] == [36, 41]


def test_where_the_loop_tells_its_steps() -> None:
    """Trainer's own numbers, from 101; a step that is begun and has a larger batch keeps its number."""
    model, optimizer = make()
    with traced(model, optimizer, SPARSE, explicit_steps=True) as tracer:
        for number in range(101, 161):
            tracer.begin_step(number)
            step(model, optimizer, rows=2 * ROWS if number == 150 else ROWS)
            tracer.end_step()
            step(model, optimizer)  # belongs to no step
    assert tracer.snapshot().totals.steps == 60
    assert [record.step for record in tracer.history if record.step > 132] == [141, 150, 151]


def test_several_optimizers_and_micro_batches_are_one_step() -> None:
    """Also where they are skipped."""
    model, _ = make()
    first = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.SGD([*model.second.parameters(), *model.head.parameters()], lr=0.1)
    with traced(model, [first, second], SPARSE) as tracer:
        for _ in range(50):
            for _ in range(2):
                loss_of(model).backward()
            first.step()
            second.step()
    assert tracer.snapshot().totals.steps == 50
    assert tracer.history[-1].step == 42


class Announcing(torch.optim.AdamW):
    """An optimizer with a step of its own around its base class's: torch calls the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_is_told_of_twice_steps_once() -> None:
    """Also right after a record, when the outer of the two calls is still to end."""
    make()  # from the first AdamW of the process on, its own step has hooks too
    model, optimizer = make(Announcing)
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 61):
            step(model, optimizer)
            assert tracer.snapshot().totals.steps == number
    assert [record.step for record in tracer.history] == [*AT_FIRST, 42, 52]


def test_batches_of_many_shapes_are_passed_over_unless_they_are_larger() -> None:
    """Told by the tokens, whether the batch is given by position or by the name that the model has for it."""
    model, optimizer = make()
    model.main_input_name = "rows"
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 61):
            rows = torch.randn({40: 2 * ROWS, 44: 2 * ROWS}.get(number, 1 + number % ROWS), WIDTH)
            loss = model(rows) if number % 2 else model(rows=rows)
            loss.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.step for record in tracer.history] == [*AT_FIRST, 40, 42, 52]


class Packed(nn.Module):
    """Takes a nested batch apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.body(rows) for rows in batch.unbind()])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_batches(layout: torch.layout) -> None:
    """Which have no shape that could be looked at in passing: recorded, traced and skipped like others."""
    model = Packed()
    optimizer = torch.optim.AdamW(model.parameters())
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 61):
            lengths = (2, 9) if number == 45 else (2, 1 + number % 4)
            rows = [torch.randn(length, WIDTH) for length in lengths]
            model(torch.nested.nested_tensor(rows, layout=layout)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.step for record in tracer.history] == [*AT_FIRST, 42, 45, 52]
    assert tracer.history[-2].batch == BatchShape(shape=(1, 11, WIDTH), tokens=11, largest_micro_batch_tokens=11)


def test_evaluations_belong_to_no_step() -> None:
    """Forward passes without gradients, whatever their size."""
    model, optimizer = make()
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 61):
            with torch.no_grad():
                model(torch.randn(3 * ROWS, WIDTH))
            assert tracer.snapshot().totals.steps == number - 1
            step(model, optimizer)
    assert [record.step for record in tracer.history] == [*AT_FIRST, 42, 52]


@pytest.mark.parametrize("trace_every", [0, 7])
def test_a_fixed_interval_of_traces_leaves_every_step_its_record(trace_every: int) -> None:
    """The budget spaces nothing then."""
    model, optimizer = make()
    config = TracerConfig(strict=True, port=None, step_log=False, overhead_budget=0, trace_every=trace_every)
    with traced(model, optimizer, config) as tracer:
        for _ in range(50):
            step(model, optimizer)
    assert [record.step for record in tracer.history] == list(range(1, 51))


def test_training_is_the_same_bit_for_bit() -> None:
    """Law 5, through recorded, traced and passed-over steps."""
    outcomes = []
    for sparse in (False, True):
        model, optimizer = make()
        if sparse:
            with traced(model, optimizer, SPARSE):
                losses = [step(model, optimizer) for _ in range(60)]
        else:
            losses = [step(model, optimizer) for _ in range(60)]
        outcomes.append((losses, list(model.parameters())))
    assert outcomes[0][0] == outcomes[1][0]
    for left, right in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert torch.equal(left, right)


class WithLoss(nn.Module):
    """Trained by a method beside `forward`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)


@pytest.mark.parametrize("by_method", [False, True], ids=["forward", "a method"])
def test_what_a_skipped_step_calls(by_method: bool) -> None:
    """Calls are what takes time in a step of a millisecond: 14 of them, torch's own for hooks among them.

    One more must be worth it: with 40, which it had, the tiny perceptron of the benchmarks trained 1.5 % slower. A
    model that is never called itself has no more. The eighth of steps that is timed has two.
    """
    model, optimizer = make()
    owner = WithLoss(model) if by_method else model
    call = owner.loss if by_method else model
    calls = 0

    def counting(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def calls_of_ten_steps() -> int:
        nonlocal calls
        calls = 0
        sys.setprofile(counting)
        for _ in range(10):
            optimizer.zero_grad()
            call(inputs).sum().backward()
            optimizer.step()
        sys.setprofile(None)
        return calls

    inputs = torch.ones(ROWS, WIDTH)
    calls_of_ten_steps()
    bare = calls_of_ten_steps()
    with traced(owner, optimizer, replace(SPARSE, max_trace_interval=100_000)):
        for _ in range(3):
            calls_of_ten_steps()
        fewest = min(calls_of_ten_steps() for _ in range(3))
    assert (fewest - bare) / 10 < 15


def test_a_step_that_does_not_end_is_said_to_be_endless_where_it_is_skipped_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The optimizer was replaced: forward pass follows forward pass. One line says so, and the metric until it ends."""
    model, optimizer = make()
    with traced(model, optimizer, SPARSE) as tracer:
        for _ in range(35):
            step(model, optimizer)
        assert tracer.history[-1].step < 35
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(510):
            step(model, other)
        assert tracer.snapshot().not_seen == ()
        for _ in range(1100):
            step(model, other)
        assert tracer.snapshot().not_seen == (Unseen.STEP_END,)
        for _ in range(20):
            step(model, optimizer)
        assert tracer.snapshot().not_seen == ()
    assert len([found for found in caplog.records if found.name == "memtrace"]) == 1


def test_steps_without_a_forward_pass_of_the_model_are_skipped_too() -> None:
    """Where none can be traced, none is waited for; a forward pass that comes after all is seen and traced."""

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.loss(rows)

        def loss(self, rows: torch.Tensor) -> torch.Tensor:
            return F.linear(rows, self.layer.weight).sum()

    model = Agent()
    optimizer = torch.optim.AdamW(model.parameters())
    with traced(model, optimizer, SPARSE) as tracer:
        for number in range(1, 81):
            loss = model.loss if number <= 70 else model
            loss(torch.ones(ROWS, WIDTH)).backward()
            optimizer.step()
            optimizer.zero_grad()
    steps = [record.step for record in tracer.history]
    assert steps[:32] == AT_FIRST
    assert len(steps) < 40
    assert [record.traced for record in tracer.history[:32]] == [False] * 32
    assert any(record.traced for record in tracer.history)

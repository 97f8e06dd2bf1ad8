"""What steps leave behind on a CPU: what the next step replaces is no growth, what stays is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from memtrace.attribution.leftovers import MOST_BLOCKS, Leftovers
from memtrace.attribution.timeline import StepMarks, Timeline, replay
from memtrace.config import TracerConfig
from memtrace.record.breakdown import DeviceReading
from memtrace.record.risk_reading import GrowthForecast
from memtrace.risk import RiskMonitor
from memtrace.sources.events import Event, Events, Window
from memtrace.tracing.tracer import Tracer

WIDTH, ROWS = 64, 1024
OUTPUT_BYTES = ROWS * WIDTH * 4
END = 1000


class TwoHeads(nn.Module):
    """A model with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(rows).relu()
        return self.policy(hidden), self.value(hidden)


def update(optimizer: torch.optim.Optimizer, *outputs: torch.Tensor) -> None:
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The loop's names keep the outputs until the next forward pass has returned."""
    while True:
        policy, value = model(torch.randn(ROWS, WIDTH))
        update(optimizer, policy, value)
        yield


def in_a_function(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The outputs go when the function returns: after the step, and before the next one."""

    def step() -> None:
        policy, value = model(torch.randn(ROWS, WIDTH))
        update(optimizer, policy, value)

    while True:
        step()
        yield


def in_turns(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Batches of two sizes: what a step leaves is now more and now less than what it replaces."""
    while True:
        for rows in (ROWS, ROWS // 4, ROWS // 2):
            policy, value = model(torch.randn(rows, WIDTH))
            update(optimizer, policy, value)
            yield


def last_four(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A list keeps the outputs of the last four steps."""
    kept: list[torch.Tensor] = []
    while True:
        policy, value = model(torch.randn(ROWS, WIDTH))
        update(optimizer, policy, value)
        kept = [*kept, policy.detach()][-4:]
        yield


def all_of_them(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A list keeps one of the two outputs of every step; the other one is replaced."""
    kept: list[torch.Tensor] = []
    while True:
        policy, value = model(torch.randn(ROWS, WIDTH))
        kept.append(policy.detach())
        update(optimizer, policy, value)
        yield


def growth(loop: Callable[..., Iterator[None]], steps: int, **settings: Any) -> GrowthForecast | None:
    """Trains, and returns the growth that is seen where the process grows with each step by what all outputs take."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters())
    config = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, history=1000, **settings)
    tracer, monitor, reading = Tracer(model, optimizer, config), RiskMonitor(), None
    with tracer:
        training = loop(model, optimizer)
        assert sum(1 for _ in islice(training, steps)) == steps
        training.close()
    for record in tracer.history:
        memory = DeviceReading(process_bytes=10**9 + record.step * 2 * OUTPUT_BYTES)
        reading = monitor.observe(replace(record, device_memory=memory), headroom_bytes=10**9)
    assert reading is not None
    return reading.growth


EVERY_STEP: dict[str, Any] = {"trace_every": 1}
SOME: dict[str, Any] = {"trace_every": 7}
DEFAULT: dict[str, Any] = {}


@pytest.mark.parametrize("settings", [EVERY_STEP, SOME, DEFAULT], ids=["every step", "some", "default"])
@pytest.mark.parametrize("loop", [named, in_a_function, in_turns], ids=lambda loop: loop.__name__)
def test_what_the_next_step_replaces_is_no_growth(
    loop: Callable[..., Iterator[None]], settings: dict[str, Any]
) -> None:
    """However much the process grows meanwhile: it warms up."""
    assert growth(loop, 24, **settings) is None


@pytest.mark.parametrize("settings", [EVERY_STEP, DEFAULT], ids=["every step", "default"])
def test_a_list_of_the_last_outputs_is_full_after_a_while(settings: dict[str, Any]) -> None:
    """It grows for four steps and then no more."""
    assert growth(last_four, 40, **settings) is None


@pytest.mark.parametrize("settings", [EVERY_STEP, SOME, DEFAULT], ids=["every step", "some", "default"])
@pytest.mark.parametrize("steps", [12, 150])
def test_what_stays_is_growth(settings: dict[str, Any], steps: int) -> None:
    """One output a step stays beside one that is replaced: the first one counts alone, early and late."""
    found = growth(all_of_them, steps, **settings)
    assert found is not None
    assert found.bytes_per_step == pytest.approx(OUTPUT_BYTES, rel=0.001)


def traced(*events: tuple[int, int, int]) -> Timeline:
    """A window from 0 to its end on a CPU; an event is (time, address, signed bytes)."""
    window = Window(begin_ns=0, end_ns=END, events=Events.of(Event(*event) for event in events), live_at_begin=None)
    return replay(window, (), ())


MARKS = StepMarks(begin_ns=1, end_ns=END)


def after_two(second: Timeline) -> int:
    """Returns what is gone with a second step of the 64 bytes at 4096 that a first one has left behind."""
    leftovers = Leftovers(torch.device("cpu"))
    leftovers.follow(traced((10, 4096, 64), (20, 9000, 32), (30, 9000, -32)), MARKS)
    assert leftovers.gone() == 0
    leftovers.follow(second, MARKS)
    return leftovers.gone()


@pytest.mark.parametrize(
    "event",
    [(10, 4096, -64), (10, 4096, -8), (10, 4096, 64), (10, 4096, 16), (10, 4000, 97), (10, 4159, 8), (10, 4100, -8)],
    ids=["freed", "freed, of another size", "made anew", "smaller", "reaching in", "at its end", "freed inside"],
)
def test_a_block_is_gone_where_something_else_was(event: tuple[int, int, int]) -> None:
    """Two blocks cannot lie upon each other, whether the free of the first one was seen or not."""
    assert after_two(traced(event)) == 64


@pytest.mark.parametrize("event", [(10, 4032, 64), (10, 4160, 64), (10, 4160, -64)], ids=["before", "behind", "free"])
def test_a_block_is_there_where_something_lies_beside_it(event: tuple[int, int, int]) -> None:
    """Neighbours say nothing of it."""
    assert after_two(traced(event)) == 0


def test_an_output_is_gone_with_its_storage() -> None:
    """Also between two windows, where no free is seen; once."""
    leftovers, output = Leftovers(torch.device("cpu")), torch.zeros(16)
    leftovers.begin()
    leftovers.note([output])
    leftovers.follow(traced((10, output.untyped_storage().data_ptr(), 64)), MARKS)
    view = output[:4]
    del output
    assert leftovers.gone() == 0
    del view
    gc.collect()
    assert (leftovers.gone(), leftovers.gone()) == (64, 0)


def test_a_tensor_without_memory_is_survived() -> None:
    """torch has zeros that are never stored."""
    Leftovers(torch.device("cpu")).note([torch._efficientzerotensor((4,))])


def test_what_is_followed_is_bounded() -> None:
    """A leak of many blocks: the oldest ones are forgotten, and count as what stays."""
    leftovers = Leftovers(torch.device("cpu"))
    addresses = range(4096, 4096 + 64 * (MOST_BLOCKS + 10), 64)
    leftovers.follow(traced(*((10, address, 64) for address in addresses)), MARKS)
    leftovers.follow(traced(*((10, address, -64) for address in addresses)), MARKS)
    assert leftovers.gone() == 64 * MOST_BLOCKS


def test_on_a_device_nothing_is_followed() -> None:
    """There the allocator lists what every trace begins with."""
    leftovers = Leftovers(torch.device("cuda", 0))
    leftovers.follow(traced((10, 4096, 64)), MARKS)
    leftovers.follow(traced((10, 4096, -64)), MARKS)
    assert leftovers.gone() == 0

"""Gradients that the loop drops before any optimizer has used them end a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from small_training import LARGE, assert_law_1, born
from torch import nn

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

WIDTH, ROWS = 16, 4
QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0, "history": 1000}
SETTINGS = {
    "traced": TracerConfig(**QUIET, trace_every=1),
    "counted": TracerConfig(**QUIET, trace_every=0),
    "skipped": TracerConfig(**QUIET, overhead_budget=0, max_trace_interval=10),
}
MANY = 48
SKIPPED = (1, 2, 5, 6, 7, 40, 44)
"""Steps with an overflow: the first ones, some in a row, and single ones; also where steps have no record."""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of a step; an infinite one where it overflows."""
    loss = model(torch.randn(ROWS, WIDTH)).square().mean()
    return loss * torch.inf if step in SKIPPED else loss


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """As torch's notes on mixed precision have it: gradients are dropped when the step has ended."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(1, MANY + 1):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield


def dropped_at_the_beginning(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Dropped when the next step begins, and clipped before."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(1, MANY + 1):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        yield


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Three micro batches a step, each clipped; an evaluation after each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(1, MANY + 1):
        for _ in range(3):
            scaler.scale(loss_of(model, step)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model(torch.randn(ROWS, WIDTH))
        yield


def thrown_away(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """No scaler: the loop itself leaves out an update with a norm that is not finite."""
    for step in range(1, MANY + 1):
        loss_of(model, step).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
        optimizer.zero_grad()
        yield


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("loop", "micro_batches"),
    [(scaled, 1), (dropped_at_the_beginning, 1), (accumulated, 3), (thrown_away, 1)],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_a_skipped_update_ends_the_step(
    loop: Callable[..., Iterator[None]], micro_batches: int, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has its own record, number and batch; law 1 holds in all of them, from birth, and the training is the
    same to the bit."""
    monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)  # on a slow machine a second would pass
    weights = []
    for tracer in (None, SETTINGS[settings]):
        with nullcontext() if tracer is None else born() as source:
            torch.manual_seed(0)
            model = network()
            optimizer = torch.optim.AdamW(model.parameters())
            watched = None if tracer is None else Tracer(model, optimizer, tracer, source=source)
            with watched or nullcontext():
                assert sum(1 for _ in loop(model, optimizer)) == MANY
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert watched is not None
    assert all(map(torch.equal, *weights))
    totals, history = watched.snapshot().totals, watched.history
    assert totals.steps == MANY
    assert (totals.skipped_steps > 0) == (settings == "skipped")
    assert {record.batch and record.batch.tokens for record in history} == {micro_batches * ROWS * WIDTH}
    assert_law_1(history)
    for record in history:
        if record.traced:
            assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
            assert record.moments[Moment.BACKWARD_END][Category.GRADIENTS] > 0


class Loop(NamedTuple):
    """One iteration of a loop that drops gradients within its step."""

    iteration: Callable[[nn.Module, torch.optim.Optimizer], None]
    steps: int
    """How many are counted in 20 iterations."""


def for_the_inputs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A backward pass for the gradient of the inputs, and one for the update (adversarial training)."""
    rows = torch.randn(ROWS, WIDTH, requires_grad=True)
    model(rows).square().mean().backward()
    model.zero_grad()
    model(rows.detach() + rows.grad.sign()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def moved_and_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sharpness-aware minimisation by hand: parameters are moved along the first gradient, and back before the step."""
    rows = torch.randn(ROWS, WIDTH)
    model(rows).square().mean().backward()
    with torch.no_grad():
        moves = [parameter.grad.clone() for parameter in model.parameters()]
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move)
    optimizer.zero_grad()
    model(rows).square().mean().backward()
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.sub_(move)
    optimizer.step()
    optimizer.zero_grad()


def two_passes(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two forward passes and one backward pass: nothing has come yet, and nothing is dropped."""
    chosen, rejected = model(torch.randn(ROWS, WIDTH)), model(torch.randn(ROWS, WIDTH))
    (chosen - rejected).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def set_to_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gradients that stay and are set to zero."""
    model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    "loop",
    [Loop(for_the_inputs, 23), Loop(moved_and_back, 20), Loop(two_passes, 20), Loop(set_to_zero, 20)],
    ids=lambda loop: loop.iteration.__name__,
)
@pytest.mark.parametrize("settings", ["traced", "counted"])
def test_what_belongs_to_the_step_does_not_end_it(loop: Loop, settings: str) -> None:
    """A loop that drops gradients in each step is known after three of them."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, SETTINGS[settings]) as tracer:
        for _ in range(20):
            loop.iteration(model, optimizer)
    assert tracer.snapshot().totals.steps == loop.steps


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step as most are."""
    model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def discarded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A loss that is not used: its forward pass belongs to the step that follows."""
    model(torch.randn(ROWS, WIDTH))


def dropped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that is not updated."""
    model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    optimizer.zero_grad()


def updated_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Another optimizer than the one that is watched: what it does belongs to the step that follows."""
    model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loop", "at_first"),
    [
        (Loop(for_the_inputs, 2), 1),
        (Loop(moved_and_back, 1), 1),
        (Loop(two_passes, 1), 1),
        (Loop(discarded, 0), 0),
        (Loop(dropped, 1), 0),
        (Loop(updated_by_hand, 0), 0),
    ],
    ids=lambda given: given.iteration.__name__ if isinstance(given, Loop) else "",
)
def test_what_a_loop_does_in_a_skipped_step(loop: Loop, at_first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is counted then as it is in a step with a record, but for the first time: a gradient is not heard of until then.

    What is dropped that time is one step with the next.
    """
    monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, SETTINGS["skipped"]) as tracer:
        for _ in range(35):
            plain(model, optimizer)
        assert tracer.history[-1].step < 35
        assert not model[0].weight._backward_hooks
        steps = 35
        for added in (at_first, loop.steps):
            loop.iteration(model, optimizer)
            plain(model, optimizer)
            steps += 1 + added
            assert tracer.snapshot().totals.steps == steps
        assert tracer.history[-1].step < 35


def test_no_record_has_more_than_one_batch_wherever_gradients_are_dropped_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a step with a record, the last one that is skipped, or one between: every step of a gap of ten is tried."""
    monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)
    counted = set()
    for first in range(40, 51):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        with Tracer(model, optimizer, SETTINGS["skipped"]) as tracer:
            for step in range(1, 61):
                (dropped if step in (first, first + 4) else plain)(model, optimizer)
        assert {record.batch and record.batch.tokens for record in tracer.history} == {ROWS * WIDTH}
        counted.add(tracer.snapshot().totals.steps)
    assert counted == {59, 60}


def test_it_is_known_anew_where_the_loop_changes() -> None:
    """After a step without dropped gradients, those that are dropped end a step again."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, SETTINGS["counted"]) as tracer:
        for _ in range(6):
            for_the_inputs(model, optimizer)
        before = tracer.snapshot().totals.steps
        two_passes(model, optimizer)
        for _ in islice(thrown_away(model, optimizer), 3):
            pass
    assert (before, tracer.snapshot().totals.steps) == (9, 13)


def test_a_trace_is_not_longer_than_its_step() -> None:
    """What follows a skipped update is in the next record: its batch is another one."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, SETTINGS["traced"]) as tracer:
        model(torch.randn(ROWS, WIDTH)).square().mean().backward()
        torch.empty(LARGE, dtype=torch.uint8)
        optimizer.zero_grad()
        two_passes(model, optimizer)
    first, second = (record.moments[Moment.PEAK].total_bytes for record in tracer.history)
    assert first > LARGE > second


def test_the_parameter_that_stands_for_all_is_let_go() -> None:
    """Where the model gets another one in its place."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, SETTINGS["counted"]):
        old = weakref.ref(model[0].weight)
        optimizer.param_groups.clear()
        model[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        assert old() is None


def test_a_frozen_model_has_none() -> None:
    """Nothing stands for a model in which nothing is trained: it is watched all the same."""
    model = network().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, SETTINGS["counted"]) as tracer:
        model(torch.randn(ROWS, WIDTH))
        optimizer.step()
    assert tracer.snapshot().totals.steps == 1


def test_parameters_of_inference_mode_have_no_version() -> None:
    """torch refuses to train a model that was made there; what it raises is all that is raised."""
    with torch.inference_mode():
        model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, SETTINGS["counted"]) as tracer:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot be saved for backward"):
                model(torch.randn(ROWS, WIDTH))
    assert tracer.snapshot().up


def replaced(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 0.5)
    optimizer.param_groups[0]["params"][0] = model[0].weight


def assigned(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = [*model.parameters()]


def data_replaced(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight.data = model[0].weight.data * 0.5


def to_another_type(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.double().float()


@pytest.mark.parametrize("settings", ["traced", "counted"])
@pytest.mark.parametrize("swap", [replaced, assigned, data_replaced, to_another_type])
def test_another_first_parameter_stands_for_all(swap: Callable[..., None], settings: str) -> None:
    """The first one is what tells of dropped gradients, and that the model was moved; the old one is let go."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    storage = weakref.ref(model[0].weight.untyped_storage())
    with Tracer(model, optimizer, SETTINGS[settings]) as tracer:

        def step(*, overflows: bool = False) -> None:
            model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            if not overflows:
                optimizer.step()
            optimizer.zero_grad()

        step()
        swap(model, optimizer)
        for overflows in (False, False, True, False, True, False):
            step(overflows=overflows)
        assert [record.step for record in tracer.history] == [*range(1, 8)]
        assert storage() is None
        assert tracer._watch._anchor() is model[0].weight
        if settings == "traced":
            assert all(record.traced for record in tracer.history)
        end = tracer.history[-1].moments[Moment.STEP_END]
        assert end[Category.WEIGHTS] == sum(parameter.nbytes for parameter in model.parameters())

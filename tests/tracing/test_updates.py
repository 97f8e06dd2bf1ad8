"""Updates that are not one torch optimizer stepped by the loop: when steps end, what states there are, what the peak is
made of; traced and counted, from birth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import update_forms
from small_training import FLOAT, LARGE, assert_law_1, born
from torch import nn
from update_forms import Update

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

STEPS, WIDTH, LAYERS = 6, 16, 3
LAYER = (WIDTH * WIDTH + WIDTH) * FLOAT
"""Bytes of the parameters of one layer."""
ADAM = {"exp_avg": LAYERS * LAYER, "exp_avg_sq": LAYERS * LAYER}


QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}


class Experts(nn.Module):
    """Layers in a row, one of which takes much memory for a moment in its backward pass, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for place, layer in enumerate(self.used):
            rows = torch.tanh(layer(rows))
            if place == 0:
                rows = _Spike.apply(rows, self)
        return rows

    def gradients(self) -> int:
        """Bytes of the gradients that there are."""
        return sum(p.grad.nbytes for p in self.parameters() if p.grad is not None)


class _Spike(torch.autograd.Function):
    """The highest point of a step: at the place of the first layer's output, and only in a backward pass."""

    @staticmethod
    def forward(ctx, rows, model):
        ctx.model = model
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.model.seen = ctx.model.gradients()
        torch.empty(LARGE, dtype=torch.uint8)
        return gradient, None


class Form(NamedTuple):
    """One way to update, and what is right of it."""

    make: Callable[[nn.Module], Update]
    state: dict[str, int]
    """Bytes of optimizer state by component, without step counters."""
    first_steps: int = 1
    """Steps that the first record has, where nobody steps an optimizer."""
    masters: int = 0
    beside: int = 0
    """Bytes of tensors of its own in its parameter groups."""
    at_the_end: int = 0
    """Bytes of gradients that are left when the step has ended."""


FORMS = {
    form.make.__name__: form
    for form in (
        Form(update_forms.dictionary, ADAM),
        Form(update_forms.layer_wise_dummy, ADAM, beside=FLOAT),
        Form(update_forms.held_by_name, ADAM),
        Form(update_forms.applied_by_torch, ADAM),
        Form(update_forms.beside_one_of_the_loop, ADAM, at_the_end=LAYERS * LAYER - WIDTH * WIDTH * FLOAT),
        Form(update_forms.lomo, {}, first_steps=3, at_the_end=WIDTH * WIDTH * FLOAT),
        Form(update_forms.plain_hooks, {}, first_steps=3),
        Form(update_forms.sam, {**ADAM, "old_p": LAYERS * LAYER}, at_the_end=LAYERS * LAYER),
        Form(update_forms.sam_with_a_closure, {**ADAM, "old_p": LAYERS * LAYER}),
        Form(update_forms.a_wrapper_of_two, ADAM, at_the_end=LAYERS * LAYER),
        Form(update_forms.offload, ADAM, masters=(LAYERS + 1) * LAYER),
        Form(update_forms.lookahead, {**ADAM, "slow": (LAYERS + 1) * LAYER}, at_the_end=LAYERS * LAYER),
    )
}


def train(form: Form, watch: Callable[..., AbstractContextManager[Any]]) -> tuple[Experts, Any]:
    """Returns a trained model and what has watched it."""
    torch.manual_seed(0)
    model = Experts()
    optimizer, step = form.make(model)
    with watch(model, optimizer) as watched:
        for _ in range(STEPS):
            step(lambda: model(torch.randn(4, WIDTH)).square().mean())
    return model, watched


def from_birth(form: Form, trace_every: int) -> tuple[Experts, Tracer]:
    """Trains under a tracer that has seen the model being made, and once more without: the weights are the same."""
    config = TracerConfig(**QUIET, trace_every=trace_every)
    with born() as source:
        model, tracer = train(form, partial(Tracer, config=config, source=source))
    bare, _ = train(form, lambda *_: nullcontext())
    assert all(map(torch.equal, model.parameters(), bare.parameters()))
    return model, tracer


def state_of(record: StepRecord) -> dict[str, int]:
    entries = record.moments[Moment.STEP_END].entries
    return {
        key.component: size
        for key, size in entries.items()
        if key.category is Category.OPTIMIZER_STATE and key.component != "step"
    }


@pytest.mark.parametrize("name", FORMS)
def test_traced(name: str) -> None:
    """A record for each step, law 1 from birth, each state by its name, gradients as high as they are at the peak,
    nothing that nobody claims but the loss."""
    form = FORMS[name]
    model, tracer = from_birth(form, trace_every=1)
    assert_law_1(tracer.history)
    assert [record.step for record in tracer.history] == [*range(1, STEPS - form.first_steps + 2)]
    assert all(record.traced for record in tracer.history)
    record = tracer.history[-1]
    assert state_of(record) == form.state
    end, peak = record.moments[Moment.STEP_END], record.moments[Moment.PEAK]
    assert end[Category.WEIGHTS] == (LAYERS + 1) * LAYER + form.beside
    assert end[Category.MASTER_WEIGHTS] == form.masters
    assert end[Category.GRADIENTS] == form.at_the_end
    assert peak.total_bytes > LARGE
    assert peak[Category.GRADIENTS] == model.seen
    assert max(end[Category.UNATTRIBUTED], peak[Category.UNATTRIBUTED]) <= 4 * FLOAT
    assert tracer.snapshot().not_seen == ()


@pytest.mark.parametrize("name", FORMS)
def test_counted(name: str) -> None:
    """The same steps, with the same weights and states."""
    form = FORMS[name]
    _, tracer = from_birth(form, trace_every=0)
    assert [record.step for record in tracer.history] == [*range(1, STEPS - form.first_steps + 2)]
    record = tracer.history[-1]
    assert not record.traced
    assert state_of(record) == form.state
    end = record.moments[Moment.STEP_END]
    assert end[Category.WEIGHTS] == (LAYERS + 1) * LAYER + form.beside
    assert end[Category.MASTER_WEIGHTS] == form.masters


class Towers(nn.Module):
    """Two layers that do not know of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(rows).square().mean(), self.right(rows).square().mean()

    def losses(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward(rows)


SETTINGS = {
    "traced": TracerConfig(**QUIET, trace_every=1),
    "counted": TracerConfig(**QUIET, trace_every=0),
    "skipped": TracerConfig(**QUIET, overhead_budget=0, max_trace_interval=10),
}


MANY = 48
"""Steps, of which those from the 33rd on are skipped where that is allowed."""


def check(tracer: Tracer, settings: str) -> None:
    """All steps are counted, and of those that are skipped some."""
    totals = tracer.snapshot().totals
    assert totals.steps == MANY
    assert (totals.skipped_steps > 0) == (settings == "skipped")
    assert len(tracer.history) == MANY - totals.skipped_steps


@pytest.mark.parametrize("settings", SETTINGS)
class TestTheEndOfAStep:
    """With the next forward pass after the backward pass that has updated, whatever else there is."""

    @pytest.fixture(autouse=True)
    def no_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a slow machine a second would pass before the next trace is due."""
        monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)

    def test_parts_that_are_not_used(self, settings: str) -> None:
        """Their optimizers never step, whichever they are; also where no step has a record."""
        model = Towers()
        optimizers, step = update_forms.dictionary(model)
        with Tracer(model, optimizers, SETTINGS[settings]) as tracer:
            for number in range(MANY):
                step(lambda: model(torch.randn(2, WIDTH))[number % 2])  # noqa: B023 - called at once
                with torch.no_grad():
                    model(torch.randn(2, WIDTH))
        check(tracer, settings)

    def test_two_losses_of_one_step(self, settings: str) -> None:
        """Two backward passes after one forward pass, each of which updates."""
        model = Towers()
        optimizers, _ = update_forms.dictionary(model)
        with Tracer(model, optimizers, SETTINGS[settings]) as tracer:
            for _ in range(MANY):
                for loss in model(torch.randn(2, WIDTH)):
                    loss.backward()
        check(tracer, settings)

    def test_an_optimizer_that_the_loop_steps(self, settings: str) -> None:
        """It ends the step, and where the loop leaves it out the next forward pass does."""
        model = Towers()
        optimizers, step = update_forms.beside_one_of_the_loop(model)
        with Tracer(model, optimizers, SETTINGS[settings]) as tracer:
            for number in range(MANY):
                loss = model(torch.randn(2, WIDTH))[0]
                if number % 3:
                    step(lambda: loss)  # noqa: B023 - called at once
                else:
                    loss.backward()
        check(tracer, settings)

    def test_a_backward_pass_that_fails(self, settings: str) -> None:
        """What is done anew belongs to the step that has failed."""
        model = Towers()
        optimizers, _ = update_forms.dictionary(model)
        with Tracer(model, optimizers, SETTINGS[settings]) as tracer:
            for number in range(MANY):
                if number % 3 == 2:
                    rows = torch.randn(2, WIDTH, requires_grad=True)
                    rows.register_hook(_raises)
                    with pytest.raises(LookupError):
                        model(rows)[1].backward()
                model(torch.randn(2, WIDTH))[1].backward()
        check(tracer, settings)

    def test_a_forward_pass_that_is_not_heard(self, settings: str) -> None:
        """Then the next backward pass ends it."""
        model = Towers()
        optimizers, _ = update_forms.dictionary(model)
        with Tracer(model, optimizers, SETTINGS[settings]) as tracer:
            for _ in range(MANY):
                model.losses(torch.randn(2, WIDTH))[0].backward()
        check(tracer, settings)


def _raises(_: torch.Tensor) -> None:
    raise LookupError("of the user")


def test_hooks_beside_an_optimizer_that_steps_end_nothing() -> None:
    """Hooks that only look, as loggers of norms have them: a step that accumulates is one step."""
    model, norms = Towers(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: norms.append(gradient.norm()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, SETTINGS["traced"]) as tracer:
        for _ in range(3):
            for _ in range(7):
                sum(model(torch.randn(2, WIDTH))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.batch.shape for record in tracer.history if record.batch] == [(2, WIDTH)] * 3


def test_hooks_that_take_gradients_before_the_optimizers_first_step() -> None:
    """Scores of the model before training are no steps; once the optimizer steps, its steps are the ones that count."""
    model = Towers()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, SETTINGS["counted"]) as tracer:
        for _ in range(2):
            model(torch.randn(2, WIDTH))
        for _ in range(3):
            for _ in range(4):
                sum(model(torch.randn(2, WIDTH))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tracer.snapshot().totals.steps == 3


@pytest.mark.parametrize("trace_every", [1, 0])
def test_one_optimizer_a_parameter_costs_no_more_for_each_than_few(trace_every: int) -> None:
    """What memtrace calls in a step grows with the parameters, not with their square."""

    def calls(parameters: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(parameters)))
        optimizers, step = update_forms.dictionary(model)
        count = [0]

        def counting(frame: object, event: str, argument: object) -> None:
            count[0] += event in ("call", "c_call")

        with Tracer(model, optimizers, TracerConfig(**QUIET, trace_every=trace_every)):
            step(lambda: model(torch.ones(1, 4)).sum())
            step(lambda: model(torch.ones(1, 4)).sum())
            sys.setprofile(counting)
            step(lambda: model(torch.ones(1, 4)).sum())
            step(lambda: model(torch.ones(1, 4)).sum())
            sys.setprofile(None)
        return count[0]

    few, many = calls(20), calls(80)
    assert many < 4.4 * few

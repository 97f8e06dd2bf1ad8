"""What optimizers keep, from birth, over everything that fine-tunes use; the table in docs/engines.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
from features import missing
from tables import check_table, per_parameter
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from memtrace.config import TracerConfig
from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

ADAM = {"exp_avg": 4.0, "exp_avg_sq": 4.0}
EIGHT_BIT = {"state1": 1.03, "state2": 1.03, "absmax1": 0.02, "absmax2": 0.02, "qmap1": 0.03, "qmap2": 0.03}
FACTORED = {"row_var": 0.04, "col_var": 0.04, "variance": 0.04}


class InternalMaster(torch.optim.Optimizer):
    """SGD on a float32 copy of each parameter that it keeps itself."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master_param"] = parameter.detach().float()
                state["master_param"].sub_(parameter.grad, alpha=0.01)
                parameter.copy_(state["master_param"])


class StateElsewhere(torch.optim.Optimizer):
    """Heavy ball whose momentum is in an attribute of its own, or where nobody can look."""

    def __init__(self, parameters: Iterator[nn.Parameter], *, hidden: bool = False) -> None:
        super().__init__(parameters, {})
        velocity = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}
        if not hidden:
            self.velocity = velocity
        self._velocities = velocity.items

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, velocity in self._velocities():
            velocity.mul_(0.9).add_(parameter.grad)
            parameter.sub_(velocity, alpha=0.01)


def schedule_free(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-3)
    optimizer.train()
    return optimizer


def of(optimizer: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: optimizer(model.parameters(), **settings)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter for parameter in model.parameters() if parameter.dim() == 2])


ROWS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, float]]] = {
    "torch SGD, momentum": (of(torch.optim.SGD, momentum=0.9), {"momentum_buffer": 4.0}),
    "torch SGD, momentum, fused": (of(torch.optim.SGD, momentum=0.9, fused=True), {"momentum_buffer": 4.0}),
    "torch Adam": (of(torch.optim.Adam), ADAM),
    "torch AdamW": (of(torch.optim.AdamW), ADAM),
    "torch AdamW, foreach": (of(torch.optim.AdamW, foreach=True), ADAM),
    "torch AdamW, fused": (of(torch.optim.AdamW, fused=True), ADAM),
    "torch AdamW, amsgrad": (of(torch.optim.AdamW, amsgrad=True), {**ADAM, "max_exp_avg_sq": 4.0}),
    "torch NAdam": (of(torch.optim.NAdam), ADAM),
    "torch RAdam": (of(torch.optim.RAdam), ADAM),
    "torch Adamax": (of(torch.optim.Adamax), {"exp_avg": 4.0, "exp_inf": 4.0}),
    "torch Adagrad": (of(torch.optim.Adagrad), {"sum": 4.0}),
    "torch Adadelta": (of(torch.optim.Adadelta), {"acc_delta": 4.0, "square_avg": 4.0}),
    "torch RMSprop": (of(torch.optim.RMSprop), {"square_avg": 4.0}),
    "torch Rprop": (of(torch.optim.Rprop), {"prev": 4.0, "step_size": 4.0}),
    "torch ASGD": (of(torch.optim.ASGD), {"ax": 4.0}),
    "torch Adafactor": (of(torch.optim.Adafactor), FACTORED),
    "torch Muon, matrices only": (muon, {"momentum_buffer": 3.96}),
    "torch LBFGS, history of 2": (
        of(torch.optim.LBFGS, max_iter=4, history_size=2),
        {"d": 4.0, "old_dirs": 8.0, "old_stps": 8.0, "prev_flat_grad": 4.0},
    ),
    "transformers Adafactor": (
        of(TransformersAdafactor),
        {"exp_avg_sq": 0.04, "exp_avg_sq_col": 0.04, "exp_avg_sq_row": 0.04},
    ),
    "schedulefree AdamW": (schedule_free, {"exp_avg_sq": 4.0, "z": 4.0}),
    "bitsandbytes 8-bit AdamW": (of(bitsandbytes.optim.AdamW8bit, min_8bit_size=512), EIGHT_BIT),
}

NEEDS = {"torch Muon, matrices only": "Muon", "bitsandbytes 8-bit AdamW": "optimizers of bitsandbytes on a CPU"}
"""What only some versions have, by the row that needs it."""
NAMES = [pytest.param(name, marks=[pytest.mark.needs(NEEDS[name])] if name in NEEDS else []) for name in ROWS]


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    return nn.Sequential(*layers).to(dtype)


def train(make: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32) -> tuple[int, StepRecord]:
    """Returns the number of parameters and the last traced record of two steps, watched from birth."""
    source = CpuEvents()
    source.open()
    model = build(dtype)
    optimizer = make(model)
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64, dtype=dtype)).square().mean()
        loss.backward()
        return loss

    with Tracer(model, optimizer, config, source=source) as tracer:
        for _ in range(2):
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        record = next(record for record in reversed(tracer.history) if record.traced)
    return sum(parameter.numel() for parameter in model.parameters()), record


def state_of(moment: Breakdown, parameters: int) -> dict[str, float]:
    """Returns bytes per parameter of each part of the state that has at least a hundredth of one."""
    parts: dict[str, float] = {}
    for key, size in moment.entries.items():
        if key.category is Category.OPTIMIZER_STATE:
            parts[key.component] = parts.get(key.component, 0.0) + size / parameters
    return {name: round(size, 2) for name, size in sorted(parts.items()) if round(size, 2)}


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, StepRecord]]:
    return {name: train(make) for name, (make, _) in ROWS.items() if name not in NEEDS or not missing(NEEDS[name])}


@pytest.mark.parametrize("name", NAMES)
def test_state_has_its_closed_form(measured, name):
    """Every part of the state has as many bytes a parameter as the algorithm says."""
    parameters, record = measured[name]
    assert state_of(record.moments[Moment.STEP_END], parameters) == dict(sorted(ROWS[name][1].items()))


@pytest.mark.parametrize("name", NAMES)
def test_categories_add_up_and_nothing_is_left(measured, name):
    """Law 1 at every moment, and at the peak at most 1 % that nobody claims."""
    _, record = measured[name]
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
    peak = record.moments[Moment.PEAK]
    assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


def test_an_internal_float32_copy_is_a_master():
    """A state called `master_param` is a master copy, beside bf16 weights and gradients."""
    parameters, record = train(of(InternalMaster), torch.bfloat16)
    moment = record.moments[Moment.BACKWARD_END]
    assert moment[Category.WEIGHTS] == 2 * parameters
    assert moment[Category.MASTER_WEIGHTS] == 4 * parameters
    assert moment[Category.GRADIENTS] == 2 * parameters
    assert moment[Category.OPTIMIZER_STATE] == 0
    peak = record.moments[Moment.PEAK]
    assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


def test_state_in_an_attribute_is_found():
    """What an optimizer keeps outside `state` has the name of the attribute."""
    parameters, record = train(of(StateElsewhere))
    end = record.moments[Moment.STEP_END]
    assert state_of(end, parameters) == {"velocity": 4.0}
    assert end[Category.UNATTRIBUTED] <= 0.01 * 4 * parameters


def test_state_that_nobody_can_look_at_is_unattributed():
    """Shown as claimed by nobody, all of it."""
    parameters, record = train(of(StateElsewhere, hidden=True))
    unattributed = record.moments[Moment.STEP_END][Category.UNATTRIBUTED]
    assert 4 * parameters <= unattributed <= 1.01 * 4 * parameters
    assert record.moments[Moment.STEP_END].total_bytes == record.moments[Moment.STEP_END].allocated_bytes


def test_one_optimizer_per_parameter_inside_the_backward_pass():
    """Gradients are freed one by one; each optimizer's state is found, and the step ends with the last of them."""
    source = CpuEvents()
    source.open()
    model = build()
    optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)
    with Tracer(model, list(optimizers.values()), config, source=source) as tracer:
        for _ in range(3):  # a step of this kind is over when the next one begins
            model(torch.ones(4, 64)).square().mean().backward()
        steps, record = len(tracer.history), tracer.history[-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    end = record.moments[Moment.STEP_END]
    assert steps == 2
    assert record.traced
    assert end.total_bytes == end.allocated_bytes
    assert state_of(end, parameters) == ADAM
    assert end[Category.GRADIENTS] == 0, "the step ends with its backward pass"
    peak = record.moments[Moment.PEAK]
    assert peak[Category.GRADIENTS] < 4 * parameters
    assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


@pytest.mark.needs("Muon")
@pytest.mark.needs("optimizers of bitsandbytes on a CPU")
def test_the_page_has_the_measured_bytes(measured):
    """docs/engines.md shows every row."""
    rows = []
    for name, (parameters, record) in measured.items():
        state = state_of(record.moments[Moment.STEP_END], parameters)
        size = record.moments[Moment.STEP_END][Category.OPTIMIZER_STATE]
        parts = ", ".join(f"{part} {value:.2f}" for part, value in state.items())
        rows.append([name, per_parameter(size, parameters), parts])
    check_table("optimizers", ["optimizer", "bytes per parameter", "of which"], rows)

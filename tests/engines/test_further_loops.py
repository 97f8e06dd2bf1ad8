"""Loops of Accelerate and Fabric, and what plain ones do with gradients and graphs; from birth, and by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from small_training import EVERY_STEP, born
from torch import nn
from torch.func import functional_call, grad, vmap

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

WIDTH, ROWS, CALLS = 64, 8, 4
CLASSES = 512
BY_DEFAULT = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0)
SMALL = 64

Step = Callable[[torch.Tensor], torch.Tensor]
Loop = Callable[[], tuple[nn.Module, Any, Step]]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def updated(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def accumulating() -> tuple[nn.Module, Any, Step]:
    """Accelerate's `accumulate`: every second call of `step()` does something."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = block()
    model, optimizer = accelerator.prepare(model, adam(model))

    def step(rows: torch.Tensor) -> torch.Tensor:
        with accelerator.accumulate(model):
            loss = model(rows).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            updated(optimizer)
        return loss.detach()

    return model, optimizer, step


def autocast_by_accelerate() -> tuple[nn.Module, Any, Step]:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = block()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def step(rows: torch.Tensor) -> torch.Tensor:
        loss = model(rows).square().mean()
        accelerator.backward(loss)
        updated(optimizer)
        schedule.step()
        return loss.detach()

    return model, optimizer, step


def fabric(precision: str) -> Loop:
    def make() -> tuple[nn.Module, Any, Step]:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        with fabric.init_module():
            model = block()
        model, optimizer = fabric.setup(model, adam(model))

        def step(rows: torch.Tensor) -> torch.Tensor:
            loss = model(rows).float().square().mean()
            fabric.backward(loss)
            updated(optimizer)
            return loss.detach()

        return model, optimizer, step

    return make


def plain(loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor], make: Callable[[], nn.Module] = block) -> Loop:
    def loop() -> tuple[nn.Module, Any, Step]:
        model = make()
        optimizer = adam(model)

        def step(rows: torch.Tensor) -> torch.Tensor:
            loss = loss_of(model, rows)
            loss.backward()
            result = loss.detach()
            del loss
            updated(optimizer)
            return result

        return model, optimizer, step

    return loop


def in_a_closure() -> tuple[nn.Module, Any, Step]:
    model = block()
    optimizer = adam(model)

    def step(rows: torch.Tensor) -> torch.Tensor:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(rows).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    return model, optimizer, step


def gradients_by_hand() -> tuple[nn.Module, Any, Step]:
    """`torch.autograd.grad`, put into the parameters by the loop."""
    model = block()
    optimizer = adam(model)

    def step(rows: torch.Tensor) -> torch.Tensor:
        loss = model(rows).square().mean()
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            parameter.grad = gradient
        del gradient
        updated(optimizer)
        return loss.detach()

    return model, optimizer, step


def gradients_of_samples() -> tuple[nn.Module, Any, Step]:
    """One gradient for each row, as differential privacy takes them, beside a forward pass for the loss."""
    model = block()
    optimizer = adam(model)

    def loss_of(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row[None],)).square().mean()

    def step(rows: torch.Tensor) -> torch.Tensor:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients = vmap(grad(loss_of), (None, 0))(parameters, rows)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].mean(0)
        del gradients
        updated(optimizer)
        with torch.no_grad():
            return model(rows).square().mean()

    return model, optimizer, step


def penalised(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A penalty on the gradient of the input: a second backward pass through the first."""
    rows = rows.clone().requires_grad_()
    loss = model(rows).square().mean()
    (slope,) = torch.autograd.grad(loss, rows, create_graph=True)
    return loss + slope.square().sum()


def of_two_losses() -> tuple[nn.Module, Any, Step]:
    """Two backward passes through one graph."""
    model = block()
    optimizer = adam(model)

    def step(rows: torch.Tensor) -> torch.Tensor:
        output = model(rows)
        first, second = output.square().mean(), output.abs().mean()
        first.backward(retain_graph=True)
        second.backward()
        result = (first + second).detach()
        del output, first, second
        updated(optimizer)
        return result

    return model, optimizer, step


def head_in_parts() -> tuple[nn.Module, Any, Step]:
    """The head and its loss in parts, each with a backward pass of its own, then that of the body."""
    model = nn.ModuleDict({"body": block(), "head": nn.Linear(WIDTH, CLASSES)})
    optimizer = adam(model)

    def step(rows: torch.Tensor) -> torch.Tensor:
        hidden = model["body"](rows)
        leaf, total = hidden.detach().requires_grad_(), torch.zeros(())
        for part in leaf.chunk(4):
            loss = model["head"](part).logsumexp(-1).mean()
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
        del hidden, leaf, part, loss
        updated(optimizer)
        return total

    return model, optimizer, step


class Experts(nn.Module):
    """Four networks, of which each row takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList(block() for _ in range(4)), nn.Linear(WIDTH, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weights = self.gate(rows).softmax(-1)
        chosen, output = weights.argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            where = (chosen == number).nonzero().flatten()
            if len(where):
                output = output.index_add(0, where, expert(rows[where]) * weights[where, number, None])
        return output


def in_windows_of_time() -> tuple[nn.Module, Any, Step]:
    """Truncated backpropagation through time: the state of one step is the next one's."""
    model = nn.GRU(WIDTH, WIDTH, batch_first=True)
    optimizer = adam(model)
    state: list[torch.Tensor] = [torch.zeros(1, ROWS, WIDTH)]

    def step(rows: torch.Tensor) -> torch.Tensor:
        output, last = model(rows[:, None].expand(-1, 5, -1).contiguous(), state.pop())
        loss = output.square().mean()
        loss.backward()
        state.append(last.detach().clone())
        del output, last
        updated(optimizer)
        return loss.detach()

    return model, optimizer, step


LOOPS: Mapping[str, Loop] = {
    "Accelerate, accumulate": accumulating,
    "Accelerate, bf16": autocast_by_accelerate,
    "Fabric, bf16-mixed": fabric("bf16-mixed"),
    "Fabric, bf16-true": fabric("bf16-true"),
    "closure": in_a_closure,
    "gradients by autograd.grad": gradients_by_hand,
    "gradients of samples": gradients_of_samples,
    "gradient penalty": plain(penalised),
    "two losses, one graph": of_two_losses,
    "head in parts": head_in_parts,
    "experts": plain(lambda model, rows: model(rows).square().mean(), Experts),
    "recurrent, in windows": in_windows_of_time,
    "nested tensors": plain(
        lambda model, rows: (
            model(torch.nested.nested_tensor([rows[:3], rows[3:]], layout=torch.jagged)).values().square().mean()
        )
    ),
    "weights that are computed": plain(
        lambda model, rows: model(rows).square().mean(),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), block()),
    ),
}
CALLS_OF_A_STEP = {"Accelerate, accumulate": 2}
BATCH = 4 * ROWS * WIDTH
KEPT = {"recurrent, in windows": 2 * BATCH, "gradient penalty": BATCH, "nested tensors": BATCH}
"""Bytes that a loop has in hand: the batch that the model gets a copy of, a state for the next step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a training."""

    name: str
    losses: Sequence[float]
    parameters: Sequence[torch.Tensor]
    records: Sequence[StepRecord]


def train(name: str, config: TracerConfig | None) -> Run:
    torch.manual_seed(0)
    with born() if config is EVERY_STEP else nullcontext() as source:
        model, optimizer, step = LOOPS[name]()
        losses = []
        with Tracer(model, optimizer, config, source=source) if config else nullcontext() as tracer:
            for _ in range(CALLS * CALLS_OF_A_STEP.get(name, 1)):
                losses.append(step(torch.randn(ROWS, WIDTH)).item())
    return Run(name=name, losses=losses, parameters=[*model.parameters()], records=[*tracer.history] if tracer else [])


@pytest.fixture(scope="module", params=LOOPS)
def runs(request) -> Iterator[Mapping[str, Run]]:
    ways = {"plain": None, "every step": EVERY_STEP, "by default": BY_DEFAULT}
    yield {way: train(request.param, config) for way, config in ways.items()}
    AcceleratorState._reset_state(True)  # or the next `Accelerator()` of the process has its precision


@pytest.mark.parametrize("way", ["every step", "by default"])
def test_training_is_the_same(runs, way) -> None:
    """Losses and weights have the bits of the run without memtrace; each update is a step, one of three is traced."""
    assert runs[way].losses == runs["plain"].losses
    pairs = zip(runs[way].parameters, runs["plain"].parameters, strict=True)
    assert all(torch.equal(watched, plain) for watched, plain in pairs)
    assert len(runs[way].records) == CALLS
    assert any(record.traced for record in runs[way].records[:3])


def test_each_moment_is_right(runs) -> None:
    """Law 1; weights, gradients and state in closed form; nobody owns a few numbers, and what the loop takes along."""
    parameters = sum(parameter.nbytes for parameter in runs["plain"].parameters)
    traced, kept = [one for one in runs["every step"].records if one.traced], KEPT.get(runs["plain"].name, 0)
    assert len(traced) >= CALLS - 1
    for record in traced:
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
            assert moment[Category.WEIGHTS] == parameters
        for name in (Moment.STEP_END, Moment.PEAK):
            assert record.moments[name][Category.UNATTRIBUTED] <= kept + SMALL
    entries = traced[-1].moments[Moment.STEP_END].entries
    state = {key.component: size for key, size in entries.items() if key.category is Category.OPTIMIZER_STATE}
    assert state["exp_avg"] == state["exp_avg_sq"] == parameters
    assert traced[-1].moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameters


def test_counted_steps_end_as_traced_ones(runs) -> None:
    """Weights and state, without a trace."""
    for record in runs["by default"].records[1:]:
        moment = record.moments[Moment.STEP_END]
        assert moment[Category.WEIGHTS] == sum(parameter.nbytes for parameter in runs["plain"].parameters)
        assert moment[Category.OPTIMIZER_STATE] > 0

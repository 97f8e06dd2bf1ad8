"""Models that use torch.func: what torch allows beside hooks on saved tensors, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

ROWS, WIDTH = 64, 32
TRACED = TracerConfig(strict=True, port=None, step_log=False, trace_every=1)
Energy = Callable[[torch.Tensor], torch.Tensor]


def pulled_back(energy: Energy) -> Energy:
    """The derivative by `torch.func.vjp`, whose second half runs where hooks are allowed again."""

    def derivative(row: torch.Tensor) -> torch.Tensor:
        value, pull = torch.func.vjp(energy, row)
        return pull(torch.ones_like(value))[0]

    return derivative


def pushed_forward(energy: Energy) -> Energy:
    return lambda row: torch.func.jvp(energy, (row,), (torch.ones_like(row),))[1]


def by_rows(net: nn.Module) -> Energy:
    """Gradients of each row by the parameters, put into a `torch.func.functional_call`."""
    parameters = dict(net.named_parameters())

    def energy(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, values, (row,)).sum()

    gradients = torch.func.vmap(torch.func.grad(energy), in_dims=(None, 0))
    return lambda rows: torch.cat([each.flatten() for each in gradients(parameters, rows).values()])


def of(net: nn.Module) -> Energy:
    return lambda row: net(row).sum()


vmap, grad = torch.func.vmap, torch.func.grad
USES: dict[str, Callable[[nn.Module], Energy]] = {
    "vmap": lambda net: vmap(of(net)),
    "jacfwd": lambda net: vmap(torch.func.jacfwd(of(net))),
    "jvp": lambda net: pushed_forward(of(net)),
    "grad": lambda net: vmap(grad(of(net))),
    "grad of the whole": lambda net: grad(of(net)),
    "grad of grad": lambda net: vmap(grad(lambda row: grad(of(net))(row).square().sum())),
    "hessian": lambda net: vmap(torch.func.hessian(of(net))),
    "vjp": lambda net: vmap(pulled_back(of(net))),
    "vjp of the whole": lambda net: pulled_back(of(net)),
    "functional_call": by_rows,
    "functional_call outside": lambda net: (
        lambda rows: torch.func.functional_call(net, {name: 2 * each for name, each in net.named_parameters()}, (rows,))
    ),
}


class Forces(nn.Module):
    """Applies a transform of torch.func to an energy."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        self.use = use

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return USES[self.use](self.net)(self.net[0](rows) + rows)


def train(use: str, *, steps: int = 3, **settings: bool) -> tuple[list[float], Tracer | None]:
    """Returns the losses; `settings` are those of the tracer, without any it is the run without memtrace."""
    torch.manual_seed(0)
    model = Forces(use)
    optimizer = torch.optim.AdamW(model.parameters())
    config = replace(TRACED, **settings)
    tracer = Tracer(model, optimizer, config) if settings else None
    if tracer is not None:
        tracer.attach()
    losses = []
    try:
        for _ in range(steps):
            loss = model(torch.randn(ROWS, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        if tracer is not None:
            tracer.detach()
    return losses, tracer


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("use", USES)
def test_training_is_the_same(use: str, activations: bool) -> None:
    """Every step is traced, the first one too, the categories add up, and no loss differs in a bit."""
    losses, tracer = train(use, trace_activations=activations)
    assert losses == train(use)[0]
    assert tracer is not None
    assert [record.traced for record in tracer.history] == [True] * 3
    for record in tracer.history:
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] >= 4 * ROWS * WIDTH
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes


def test_without_the_hooks_activations_are_known_by_their_life() -> None:
    """What the forward pass makes and the backward pass frees; all else keeps its category."""
    _, tracer = train("grad", trace_activations=False)
    assert tracer is not None
    last = tracer.history[-1].moments
    assert last[Moment.FORWARD_END][Category.ACTIVATIONS] >= 4 * ROWS * WIDTH
    assert last[Moment.BACKWARD_END][Category.ACTIVATIONS] == last[Moment.STEP_END][Category.ACTIVATIONS] == 0
    size = 4 * sum(parameter.numel() for parameter in Forces("grad").parameters())
    # the bias of the last layer has no part in a gradient by the rows
    assert last[Moment.BACKWARD_END][Category.GRADIENTS] == size - 4
    assert last[Moment.BACKWARD_END][Category.WEIGHTS] == size


def test_a_hook_of_the_user_is_refused_as_without_memtrace() -> None:
    """torch's own message, and nothing of memtrace is left on the thread; a model beside it goes on."""

    def refused(watched: bool) -> str:
        torch.manual_seed(0)
        model = Forces("grad")
        optimizer = torch.optim.AdamW(model.parameters())
        with Tracer(model, optimizer, TRACED) if watched else nullcontext():
            with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError) as raised:
                model(torch.randn(ROWS, WIDTH))
            model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            optimizer.step()
        return str(raised.value)

    assert refused(watched=True) == refused(watched=False)


def test_a_loss_that_transforms_the_model_after_its_forward_pass() -> None:
    """A penalty on the model's derivative: the first step, which is counted by default, tells that `torch.func` is
    used. From then on nothing is on when the loss begins, and what it saves is known by its life."""

    def penalised(config: TracerConfig | None) -> tuple[list[float], Tracer | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        tracer = None if config is None else Tracer(model, optimizer, config)
        losses = []
        with nullcontext() if tracer is None else tracer:
            for _ in range(4):
                rows = torch.randn(ROWS, WIDTH)
                loss = model(rows).square().mean()
                loss = loss + torch.func.grad(lambda x: model(x).sum())(rows).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, tracer

    losses, tracer = penalised(TracerConfig(strict=True, port=None, step_log=False))
    assert losses == penalised(None)[0]
    assert tracer is not None
    traced = [record for record in tracer.history if record.traced]
    assert traced[0].step == 2
    for record in traced:
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] >= ROWS * WIDTH * 4

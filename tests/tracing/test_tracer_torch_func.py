"""Models that use torch.func: what torch allows beside hooks on saved tensors, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.sources.autograd_torch_private import tells_of_nodes
from memtrace.tracing.tracer import Tracer

ROWS, WIDTH = 64, 32
USES: dict[str, Callable[..., Callable[..., torch.Tensor]]] = {
    "vmap": torch.func.vmap,
    "jacfwd": lambda energy: torch.func.vmap(torch.func.jacfwd(energy)),
    "grad": lambda energy: torch.func.vmap(torch.func.grad(energy)),
}


class Forces(nn.Module):
    """Applies a transform of torch.func to an energy."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        self.use = use

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return USES[self.use](lambda row: self.net(row).sum())(rows)


def train(use: str, *, steps: int = 3, **settings: bool) -> tuple[list[float], Tracer | None]:
    """Returns the losses; `settings` are those of the tracer, without any it is the run without memtrace."""
    torch.manual_seed(0)
    model = Forces(use)
    optimizer = torch.optim.AdamW(model.parameters())
    config = TracerConfig(strict=True, port=None, step_log=False, trace_every=1, **settings)
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


@pytest.mark.parametrize(("use", "activations"), [("vmap", True), ("jacfwd", True), ("grad", False)])
def test_training_is_the_same(use: str, activations: bool) -> None:
    """Every step is traced, the categories add up, and no loss differs in a bit."""
    losses, tracer = train(use, trace_activations=activations)
    assert losses == train(use)[0]
    assert tracer is not None
    assert all(record.traced for record in tracer.history)
    for record in tracer.history:
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


def test_the_exception_says_what_to_set() -> None:
    """torch names the hooks, memtrace the setting, nothing is left on the thread; from 2.14 on torch forbids none."""
    if tells_of_nodes():
        losses, _ = train("grad", trace_activations=True)
        assert losses == train("grad")[0]
        return
    with pytest.raises(RuntimeError, match="saved tensor hooks") as raised:
        train("grad", trace_activations=True)
    assert any("trace_activations=False" in note for note in raised.value.__notes__)


def test_a_loop_that_goes_on_after_the_exception_is_not_stopped_again() -> None:
    """From then on the hooks stay off."""
    torch.manual_seed(0)
    model = Forces("grad")
    optimizer = torch.optim.AdamW(model.parameters())
    failures = 0
    with Tracer(model, optimizer, TracerConfig(strict=True, port=None, step_log=False, trace_every=1)) as tracer:
        for _ in range(5):
            try:
                model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            except RuntimeError:
                failures += 1
                continue
            optimizer.step()
            optimizer.zero_grad()
        traced = [record.traced for record in tracer.history]
    assert failures == (0 if tells_of_nodes() else 1)
    assert any(traced)


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

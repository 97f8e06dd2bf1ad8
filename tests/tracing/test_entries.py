"""Which modules have hooks where the loop does not call its model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_training import EVERY_STEP, ON_DEMAND, ROWS, WIDTH, traced
from torch import nn

from memtrace.tracing.tracer import Tracer


class Network(nn.Module):
    """Five layers, which a method calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(5)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.loss(rows)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = layer(rows).tanh()
        return rows.sum()


def followed(model: nn.Module) -> list[str]:
    """The modules with hooks: before their forward pass, after it, or both."""
    return [
        f"{name}{'<' * len(module._forward_pre_hooks)}{'>' * len(module._forward_hooks)}"
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    ]


def step(call: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    call(torch.ones(ROWS, WIDTH)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_counted_step_has_as_many_hooks_as_one_that_calls_the_model() -> None:
    """One before the first module of a step, one after the last; while a window is open all that are called have
    them, and all there are only in the two steps after one without a forward pass."""
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    with traced(model, optimizer, ON_DEMAND) as tracer:
        assert followed(model) == ["<>"]
        step(model.loss, optimizer)
        assert followed(model) == ["<>", "layers<", *(f"layers.{i}<" for i in range(5))]
        step(model.loss, optimizer)
        step(model.loss, optimizer)
        few = ["<>", "layers.0<", "layers.4>"]
        assert followed(model) == few
        for _ in range(3):
            step(model.loss, optimizer)
            assert followed(model) == few
        tracer.trace_next()
        loss = model.loss(torch.ones(ROWS, WIDTH))
        assert followed(model) == ["<>", *(f"layers.{i}<>" for i in range(5))]
        loss.backward()
        optimizer.step()
        assert followed(model) == few
        for _ in range(3):
            step(model, optimizer)
        assert followed(model) == ["<>"]
        assert tracer.snapshot().not_seen == ()
    assert followed(model) == []


def test_a_model_that_is_called_has_hooks_of_its_own_only() -> None:
    """Traced or not, and with evaluations in between."""
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    with traced(model, optimizer):
        for _ in range(4):
            step(model, optimizer)
            with torch.no_grad():
                model.loss(torch.ones(ROWS, WIDTH))
            assert followed(model) == ["<>"]


def test_modules_that_the_compiler_of_torch_script_has_made_are_left_alone() -> None:
    """They allow no hooks; what is called beside them stands for the model."""

    class Mixed(Network):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Linear(WIDTH, WIDTH))

        def loss(self, rows: torch.Tensor) -> torch.Tensor:
            return super().loss(self.scripted(rows))

    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    with traced(model, optimizer) as tracer:
        for _ in range(3):
            step(model.loss, optimizer)
    assert [record.traced for record in tracer.history] == [False, True, True]


@pytest.mark.parametrize("failing", range(1, 7))
def test_memory_that_runs_out_in_a_module_is_reported(failing: int) -> None:
    """While all are listened to, in a window, and while two are followed; where the module is followed at all."""
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())

    def run_out(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes")

    tracer = Tracer(model, optimizer, EVERY_STEP if failing % 2 else ON_DEMAND)
    with tracer:
        for number in range(failing):
            step(model.loss, optimizer)
            assert tracer.snapshot().totals.ooms == 0, number
        handle = model.layers[4].register_forward_pre_hook(run_out)
        with pytest.raises(RuntimeError, match="allocate memory"):
            step(model.loss, optimizer)
        handle.remove()
        assert tracer.snapshot().totals.ooms == 1
        step(model.loss, optimizer)
        assert tracer.snapshot().up

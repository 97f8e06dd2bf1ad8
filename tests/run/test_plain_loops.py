"""Plain loops under `memtrace run`: what is traced, from when on, with which model, and what is let go."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrace import MemoryTracer, MemTraceOptimizer
from memtrace.adapters import forgotten
from memtrace.launch.loaded import Launched

Loop = Callable[[], Any]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launched]:
    """The hook on every optimizer, with a log in a directory of its own."""
    for name, value in {
        "PORT": "none",
        "LOG_DIR": str(tmp_path),
        "TRACE_EVERY": "1",
        "STRICT": "1",
        "QUIET": "1",
    }.items():
        monkeypatch.setenv(f"MEMTRACE_{name}", value)
    monkeypatch.setenv("MEMTRACE_DEVICE_POLL_SECONDS", "0")
    launched = Launched(strict=True)
    launched.torch(torch)
    yield launched
    launched.handle.remove()
    launched.give_way()


def records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "steps-rank0.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def weights(record: dict[str, Any]) -> int:
    entries = record["moments"]["step_end"]["entries"]
    return sum(entry["bytes"] for entry in entries if entry["category"] == "weights")


def assert_closed(record: dict[str, Any]) -> None:
    """Law 1."""
    for moment in record["moments"].values():
        assert sum(entry["bytes"] for entry in moment["entries"]) == moment["allocated_bytes"]


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def size(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, width: int = 16) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.randn(4, width)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_from_the_second_step_on(launched: Launched, tmp_path: Path) -> None:
    """The step that was begun before has no record; each later one has, and its categories add up."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        step(model, optimizer)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        assert record["traced"]
        assert weights(record) == size(model)
        assert_closed(record)


def test_a_training_is_let_go_with_its_optimizer(launched: Launched, tmp_path: Path) -> None:
    """When the function returns, model and optimizer are gone without the collector; the next one is traced too."""

    def train(steps: int) -> list[weakref.ref[Any]]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        for _ in range(steps):
            step(model, optimizer)
            scheduler.step()
        assert forgotten.are_attached(besides=None)
        return [weakref.ref(one) for one in (model, model[0].weight, optimizer)]

    gc.collect()
    gc.disable()
    try:
        for steps in (3, 2, 4):
            kept = train(steps)
            assert [one() for one in kept] == [None] * 3
            assert not forgotten.are_attached(besides=None)
    finally:
        gc.enable()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 1, 1, 2, 3]


def test_optimizers_that_take_turns_are_one_training(launched: Launched, tmp_path: Path) -> None:
    """Each record has one step of each; nothing is attached between the first and the second."""
    model = network()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    two = torch.optim.AdamW(model[2].parameters())
    for _ in range(4):
        step(model, one, two)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        components = {entry["component"] for entry in record["moments"]["step_end"]["entries"]}
        assert {"momentum_buffer", "exp_avg"} <= components
        assert_closed(record)


def test_a_generator_and_its_critic(launched: Launched, tmp_path: Path) -> None:
    """Two models with an optimizer each: a record is a cycle, five steps of one and one of the other."""
    critic, generator = network(), network()
    for_critic, for_generator = (torch.optim.AdamW(model.parameters()) for model in (critic, generator))
    for _ in range(4):
        for _ in range(5):
            for_critic.zero_grad()
            critic(generator(torch.randn(4, 16)).detach()).mean().backward()
            for_critic.step()
        for_generator.zero_grad()
        critic(generator(torch.randn(4, 16))).mean().backward()
        for_generator.step()
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 3]
    assert {weights(record) for record in found} == {size(critic, generator)}


def test_an_optimizer_that_is_not_used(launched: Launched, tmp_path: Path) -> None:
    """It is waited for while the other one makes sixteen steps; then it is not part of the training."""
    model, other = network(), network()
    optimizer, unused = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    for _ in range(18):
        step(model, optimizer)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 2]
    assert weights(found[0]) == size(model)
    assert unused.state == {}


def test_one_that_begins_later(launched: Launched, tmp_path: Path) -> None:
    """A second phase with an optimizer of its own over the same model is traced anew."""
    model = network()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, first)
    second = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        step(model, second)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 1, 2]


class Twice(torch.optim.Optimizer):
    """Wraps an optimizer, as sharpness-aware minimisation does."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Any = None) -> None:
        self.base.step()

    def second_step(self) -> None:
        self.base.step()


@pytest.mark.parametrize("method", ["step", "second_step"])
def test_an_optimizer_inside_another(method: str, launched: Launched, tmp_path: Path) -> None:
    """Whichever of the two is stepped: a record is one step of the loop."""
    model = network()
    optimizer = Twice(torch.optim.AdamW(model.parameters()))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        getattr(optimizer, method)()
    found = records(tmp_path)
    assert [record["step"] for record in found] == ([1, 2, 3, 4] if method == "step" else [1, 2, 3])
    for record in found:
        assert_closed(record)


def test_master_weights_of_the_loop(launched: Launched, tmp_path: Path) -> None:
    """The optimizer has float32 copies, which no module holds: the model is the one that they are copies of."""
    model, bystander = network().bfloat16(), network(width=8)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    for _ in range(3):
        model(torch.randn(4, 16, dtype=torch.bfloat16)).square().mean().backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    last = records(tmp_path)[-1]
    categories = {entry["category"]: entry["bytes"] for entry in last["moments"]["step_end"]["entries"]}
    assert categories["master_weights"] == 2 * size(model)
    assert weights(last) == size(model)
    assert size(bystander) not in categories.values()


def test_a_wrapper_is_the_model(launched: Launched, tmp_path: Path) -> None:
    """The outermost module is the one that the loop calls: what is frozen beside the trained part is in the figures."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network().requires_grad_(False), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = Whole()
    optimizer = torch.optim.AdamW(model.head.parameters())
    for _ in range(3):
        step(model, optimizer)
    assert weights(records(tmp_path)[-1]) == size(model)


def test_the_tracer_of_the_script_wins(launched: Launched, tmp_path: Path) -> None:
    """One that the script attaches first leaves nothing to do; one that it attaches later is given way to."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with MemTraceOptimizer(optimizer, model, step_log=False, oom_reports=0) as wrapped:
        for _ in range(2):
            step(model, wrapped)
    step(model, optimizer)
    step(model, optimizer)
    assert records(tmp_path) == [], "it is not taken over from, where the script has closed it"
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    assert len(records(tmp_path)) == 1
    with MemTraceOptimizer(optimizer, model, step_log=False, oom_reports=0) as wrapped:
        for _ in range(3):
            step(model, wrapped)
        assert [record.step for record in wrapped.tracer.history] == [1, 2, 3]
    for _ in range(2):
        step(model, optimizer)
    assert len(records(tmp_path)) == 2


def test_a_generator_and_its_critic_that_the_script_traces(launched: Launched, tmp_path: Path) -> None:
    """Neither of two optimizers is taken over when the script's own tracer has ended."""
    models = [network(), network()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    with MemoryTracer(nn.ModuleList(models), optimizers, step_log=False, oom_reports=0):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer)
    assert records(tmp_path) == []


def test_parameters_of_no_module(launched: Launched, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That is said once, and the loop goes on."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        for _ in range(3):
            parameter.square().sum().backward()
            optimizer.step()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no module has the parameters of this SGD" in line


def test_outputs_that_cannot_be_used(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost the tracing and a warning, not the loop."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMTRACE_LOG_DIR", str(tmp_path / "file"))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        for _ in range(3):
            step(model, optimizer)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("memtrace: this run is not traced, training goes on: ")
    assert not forgotten.are_attached(besides=None)

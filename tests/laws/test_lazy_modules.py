"""Modules whose parameters have no shape before their first forward pass, in each law that they could break."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
from laws.surroundings import unchanged
from torch import nn
from transformers import Trainer, TrainingArguments

import memtrace
from memtrace import MemTraceCallback, MemTraceOptimizer
from memtrace.config import TracerConfig
from memtrace.errors import PlanError
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

ROWS = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
STATES = (Category.WEIGHTS, Category.BUFFERS, Category.OPTIMIZER_STATE)


class Lazy(nn.Module):
    """Everything in it is lazy; its head may be frozen."""

    def __init__(self, *, lazy: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.body = nn.LazyLinear(32) if lazy else nn.Linear(16, 32)
        self.norm = nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(32)
        self.head = nn.LazyLinear(4) if lazy else nn.Linear(32, 4)
        for parameter in self.head.parameters():
            parameter.requires_grad = not frozen

    def forward(self, rows: torch.Tensor, labels: object = None) -> torch.Tensor:
        return self.head(self.norm(self.body(rows)).tanh()).square().mean()


def partly() -> nn.Module:
    model = Lazy()
    model.body = nn.Linear(16, 32)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"all": Lazy, "partly": partly, "frozen": lambda: Lazy(frozen=True)}


class Loop:
    masters = ()

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        with torch.autocast("cpu"):
            loss = self.model(ROWS)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def held(loop: Loop) -> dict[Category, int]:
    """The bytes of each category that lasts."""
    states = [value for state in loop.optimizer.state.values() for value in state.values()]
    tensors = (loop.model.parameters(), loop.model.buffers(), states)
    return {category: sum(one.nbytes for one in found) for category, found in zip(STATES, tensors, strict=True)}


@pytest.mark.parametrize("every", [0, 1], ids=["first", "each"])
@pytest.mark.parametrize("name", MODELS)
def test_they_count_once_they_have_a_shape(name: str, every: int) -> None:
    """Attached before the first forward pass: the first step has what it made, and training is bit-identical."""
    bare = Loop(MODELS[name])
    for _ in range(4):
        bare.step()
    loop = Loop(MODELS[name])
    config = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=every)
    with Tracer(loop.model, loop.optimizer, config) as tracer:
        for _ in range(3):
            loop.step()
            record = tracer.history[-1]
            assert {category: record.moments[Moment.STEP_END][category] for category in STATES} == held(loop)
            assert not record.traced or all(
                each.total_bytes == each.allocated_bytes for each in record.moments.values()
            )
    assert [record.traced for record in tracer.history] == ([True] * 3 if every else [False, True, False])
    with unchanged(loop):
        loop.step()
    assert all(map(torch.equal, bare.model.state_dict().values(), loop.model.state_dict().values()))


def test_memory_that_runs_out_before_they_have_a_shape_is_reported() -> None:
    """In the forward pass that would have given it: the report names what is held, and the error is the user's."""
    loop = Loop(Lazy)
    loop.model.norm.register_forward_pre_hook(lambda *_: torch.empty(2**60))
    with tempfile.TemporaryDirectory() as log_dir, pytest.raises(RuntimeError, match="memory") as raised:
        config = TracerConfig(strict=True, port=None, log_dir=log_dir, device_poll_seconds=0, trace_every=1)
        with Tracer(loop.model, loop.optimizer, config):
            loop.step()
    assert any("memtrace" in note for note in raised.value.__notes__)


def test_the_wrapper_takes_them_too() -> None:
    """As the tracer does."""
    loop = Loop(Lazy)
    optimizer = MemTraceOptimizer(loop.optimizer, loop.model, port=None, step_log=False, trace_every=1, strict=True)
    loop.optimizer = optimizer
    loop.step()
    assert optimizer.tracer.history[-1].traced
    optimizer.close()


@pytest.mark.parametrize("watched", [False, True], ids=["bare", "watched"])
def test_trainer_refuses_them_as_without_memtrace(watched: bool) -> None:
    """It counts the parameters before the first forward pass, and says so itself; with shapes it trains."""
    model = Lazy()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True
        )
        callback = MemTraceCallback(port=None, step_log=False, trace_every=1, strict=True) if watched else None
        rows = [{"rows": row, "labels": 0} for row in ROWS]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback] if callback else [])
        with pytest.raises(ValueError, match="uninitialized parameter in <method 'numel'"):
            trainer.train()


@pytest.mark.parametrize("recipe", ["fp32", "hf-autocast", "bf16-master"])
def test_a_plan_is_that_of_the_same_model_with_shapes(recipe: str) -> None:
    """A forward pass on the batch gives them, without memory."""
    plans = [
        memtrace.plan(
            lambda lazy=lazy: Lazy(lazy=lazy), lambda: ROWS, loss=lambda model, rows: model(rows), recipe=recipe
        )
        for lazy in (True, False)
    ]
    assert plans[0].moments == plans[1].moments


def test_a_plan_says_where_it_cannot_know() -> None:
    """A module that no forward pass reaches; a batch whose values decide."""

    class Unused(Lazy):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LazyLinear(8)

    def by_value(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return model(rows[: int(rows.sum().item())])

    for make, loss, said in (
        (Unused, lambda model, rows: model(rows), "no shape after a forward pass"),
        (Lazy, by_value, "cannot be given their shapes"),
    ):
        with pytest.raises(PlanError, match=said):
            memtrace.plan(make, lambda: ROWS, loss=loss)

"""Models beside the trained one, in windows from birth: named, and found where nobody has named them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from small_training import EVERY_STEP, WIDTH, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memtrace import Category, ConfigError, Moment
from memtrace.record.breakdown import StepRecord
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

HELD = 4 * (WIDTH * 64 + 64 + 64 * WIDTH + WIDTH)
"""Bytes of a teacher, without its buffer."""
BUFFER = 4 * 64


class Ema:
    """An average as libraries keep it: an object that is no module."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


def make_teacher() -> nn.Module:
    teacher = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)).requires_grad_(False)
    teacher.register_buffer("scale", torch.ones(64))
    return teacher


def train(tracer: Tracer, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[StepRecord]:
    """Returns the records; each obeys law 1 at every moment."""
    for _ in range(steps):
        model(torch.randn(4, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for record in tracer.history:
        for moment in record.moments.values():
            assert not record.traced or moment.total_bytes == moment.allocated_bytes
    return list(tracer.history)


def weights(record: StepRecord) -> dict[str, int]:
    entries = record.moments[Moment.STEP_END].entries
    return {key.component: size for key, size in entries.items() if key.category is Category.WEIGHTS}


def open_source() -> CpuEvents:
    source = CpuEvents()
    source.open()
    return source


def test_named_models_are_weights_of_their_own():
    """A module with its buffers, an EMA of shadow parameters, models in a list; what holds no memory is nothing."""
    source = open_source()
    model, optimizer = make()
    teacher, rewards = make_teacher(), [make_teacher(), len]
    ema = Ema(shadow_params=[p.detach().clone() for p in model.parameters()], model=model, optimizer=optimizer)
    trained = sum(parameter.nbytes for parameter in model.parameters())
    named = {"teacher": teacher, "rewards": rewards[:1], "ema": ema, "again": model}
    nothing = {"lazy": nn.LazyLinear(4), "meta": nn.Linear(4, 4, device="meta"), "empty": nn.ModuleList()}
    with Tracer(model, optimizer, EVERY_STEP, source=source, further_models=named | nothing) as tracer:
        traced, counted = train(tracer, model, optimizer)[0], tracer.latest
    expected = {"trainable": trained, "teacher": HELD + BUFFER, "rewards": HELD + BUFFER, "ema": trained}
    assert weights(traced) == weights(counted) == expected
    assert traced.moments[Moment.STEP_END][Category.UNATTRIBUTED] < HELD // 4
    assert traced.moments[Moment.STEP_END][Category.OPTIMIZER_STATE] >= 2 * trained


def test_a_model_that_nobody_names_is_found():
    """What nobody claims is looked for once; a list of tensors is no model: it may be a leak."""
    source = open_source()
    model, optimizer = make()
    teacher, leak = make_teacher(), [torch.ones(WIDTH, 64)]
    with Tracer(model, optimizer, EVERY_STEP, source=source) as tracer:
        records = train(tracer, model, optimizer, steps=3)
        assert [weights(record)["other_model"] for record in records] == [HELD + BUFFER] * 3
        left = records[0].moments[Moment.STEP_END][Category.UNATTRIBUTED]
        assert leak[0].nbytes <= left < leak[0].nbytes + 2048
        gone = weakref.ref(teacher)
        del teacher
        gc.collect()
        assert gone() is None, "it is held weakly"
        assert "other_model" not in weights(train(tracer, model, optimizer, steps=1)[-1])


class Closed(nn.Linear):
    """A module that lets nobody look, once it is made."""

    is_made = False

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__" and Closed.is_made:
            raise LookupError("closed")
        return super().__getattribute__(name)


@pytest.mark.filterwarnings("error")
def test_the_search_passes_modules_that_cannot_be_looked_at(monkeypatch):
    """Fake tensors, whose addresses torch warns of, what is no tensor, an `__init__` half run: none is a fault."""
    source = open_source()
    model, optimizer = make()
    teacher, closed, odd, unborn = make_teacher(), Closed(2, 2), nn.Linear(2, 2), nn.Linear.__new__(nn.Linear)
    odd._buffers["count"] = 7
    monkeypatch.setattr(Closed, "is_made", True)
    with FakeTensorMode():
        fake = nn.Linear(2, 2)
    with Tracer(model, optimizer, EVERY_STEP, source=source) as tracer:
        assert weights(train(tracer, model, optimizer)[0])["other_model"] == HELD + BUFFER
    del teacher, closed, odd, unborn, fake


def test_a_copy_that_is_made_anew_is_known_by_its_name():
    """An EMA object whose parameters are replaced is looked at anew; dropped, it is gone from the weights."""
    source = open_source()
    model, optimizer = make()
    ema = Ema(shadow=copy.deepcopy(model))
    trained = sum(parameter.nbytes for parameter in model.parameters())
    with Tracer(model, optimizer, EVERY_STEP, source=source, further_models={"ema": ema}) as tracer:
        train(tracer, model, optimizer)
        ema.shadow = copy.deepcopy(model).to(torch.float64)
        assert weights(train(tracer, model, optimizer)[-1])["ema"] == 2 * trained
        del ema
        gc.collect()
        assert weights(train(tracer, model, optimizer)[-1]) == {"trainable": trained}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"teacher": "path/to/model"}, r"further_models\['teacher'\] must be a torch.nn.Module .* got str"),
        ({"frozen": nn.Linear(1, 1)}, "neither 'trainable' nor 'frozen', got 'frozen'"),
        ({" ": nn.Linear(1, 1)}, "must be a text that is not blank"),
        ([nn.Linear(1, 1)], "must be a dictionary of models by name, got list"),
    ],
)
def test_what_cannot_be_a_further_model(named, message):
    """The error says what was wrong and what was expected."""
    with pytest.raises(ConfigError, match=message):
        Tracer(*make(), EVERY_STEP, further_models=named)

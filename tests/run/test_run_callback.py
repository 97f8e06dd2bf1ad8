"""The callback that every Trainer has under `memtrace run`."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, trainer
from transformers.integrations import TensorBoardCallback

from memtrace import MemTraceCallback
from memtrace.adapters import forgotten
from memtrace.launch.loaded import LAUNCHED
from memtrace.launch.startup.sitecustomize import AWAITED
from memtrace.launch.trainer import RunCallback


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes Trainers as the script does, after transformers was loaded."""
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS])
    for name, value in {"PORT": "none", "TRACE_EVERY": "1", "QUIET": "1", "DEVICE_POLL_SECONDS": "0"}.items():
        monkeypatch.setenv(f"MEMTRACE_{name}", value)
    LAUNCHED.trainer(trainer)

    def make(callbacks: list[Any]) -> Trainer:
        settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=3, logging_steps=1, **settings)
        samples = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(32)]
        return Trainer(Regression(), arguments, train_dataset=samples, callbacks=callbacks)

    return make


class Stops(TrainerCallback):
    """Calls something when the second step begins."""

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._stop()


class TakesOff(TrainerCallback):
    """Takes a callback off at the begin or at the end of a step."""

    def __init__(self, at: str, step: int) -> None:
        self.when = at, step
        self.take_off: Callable[[], object] = lambda: None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.when == ("begin", state.global_step):
            self.take_off()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.when == ("end", state.global_step):
            self.take_off()


class Board(TensorBoardCallback):
    """A tracker that keeps at which steps it got figures."""

    def __init__(self) -> None:
        self.tb_writer = None
        self.has_figures: dict[int, bool] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.has_figures[state.global_step] = any(key.startswith("memtrace/") for key in logs)


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The hook on the steps of all optimizers is on too, as it is under `memtrace run`."""
    monkeypatch.chdir(tmp_path)
    LAUNCHED.torch(torch)
    yield
    LAUNCHED.handle.remove()
    LAUNCHED.give_way()


def ours(made: Trainer) -> RunCallback:
    (found,) = [one for one in made.callback_handler.callbacks if isinstance(one, RunCallback)]
    return found


def test_each_trainer_has_one(make: Any) -> None:
    """It comes before the trackers, and each Trainer of a process is traced."""
    for _ in range(2):
        made = make([])
        made.train()
        assert isinstance(made.callback_handler.callbacks[1], RunCallback)
        tracer = ours(made).tracer
        assert tracer is not None
        assert [record.step for record in tracer.history] == [1, 2, 3]


def test_a_list_that_ms_swift_has_put_in_place_of_trainers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patcher gives Trainer other default callbacks when it is loaded: ours is among them again, once."""
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [trainer.DefaultFlowCallback])
    assert AWAITED["swift.trainers.patcher"] == "swift"
    for _ in range(2):
        LAUNCHED.swift(trainer)
    assert ours(make([])) is not None


def test_the_callback_of_the_script_wins(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One of the user's own traces, also one that is added later; ours does nothing, and nobody is warned."""
    own = MemTraceCallback()
    made = make([])
    made.add_callback(own)
    made.train()
    assert own.tracer is not None
    assert len(own.tracer.history) == 3
    assert ours(made).tracer is None
    assert not [record for record in caplog.records if "already" in record.getMessage()]


def test_a_callback_of_the_script_that_comes_for_the_second_training(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ours had of the first one is over, also where an exception has ended that: one tracer, one table."""
    monkeypatch.setenv("MEMTRACE_QUIET", "0")
    made = make([])
    made.train()
    failed = Stops(lambda: 1 // 0)
    made.add_callback(failed)
    with pytest.raises(ZeroDivisionError):
        made.train()
    made.remove_callback(failed)
    own = MemTraceCallback()
    made.add_callback(own)
    capsys.readouterr()
    made.train()
    assert own.tracer is not None
    assert len(own.tracer.history) == 3
    assert ours(made).tracer is None
    assert capsys.readouterr().err.count("sizes in MiB") == 1


@pytest.mark.parametrize("is_own", [True, False], ids=["of the script", "ours"])
def test_a_tracer_that_ends_within_a_training(make: Any, hooked: None, is_own: bool, tmp_path: Path) -> None:
    """It stays ended: no plain loop is made out of the rest, and trackers get no figures of before."""
    callback: MemTraceCallback

    def stop() -> None:
        assert callback.tracer is not None
        callback.tracer.detach()

    board = Board()
    own = MemTraceCallback()
    made = make([board, Stops(stop), *([own] if is_own else [])])
    callback = own if is_own else ours(made)
    made.train()
    assert callback.tracer is not None
    assert [record.step for record in callback.tracer.history] == [1]
    assert board.has_figures == {1: True, 2: False, 3: False}
    assert not forgotten.are_attached(besides=None)
    assert not list(tmp_path.rglob("memtrace-runs"))


def test_outputs_that_cannot_be_used_under_trainer(
    make: Any, hooked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost the tracing and one warning, not the training."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMTRACE_LOG_DIR", str(tmp_path / "file"))
    made = make([])
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        made.train()
    assert made.state.global_step == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("memtrace: this run is not traced, training goes on: the step log")


@pytest.mark.parametrize(
    ("is_own", "takes_off", "steps"),
    [
        (True, TakesOff("begin", 1), [1]),
        (True, TakesOff("end", 1), []),
        (False, TakesOff("begin", 1), [1]),
        (False, TakesOff("end", 2), [1, 2]),  # it comes before all others, and has ended the step
    ],
)
def test_a_callback_that_is_taken_off_within_a_training(
    make: Any, hooked: None, is_own: bool, takes_off: TakesOff, steps: list[int]
) -> None:
    """The tracer is detached with the next forward pass, and trackers get no more figures; nothing is left of it."""
    board = Board()
    made = make([takes_off, board, *([MemTraceCallback()] if is_own else [])])
    held = [one for one in made.callback_handler.callbacks if isinstance(one, MemTraceCallback)][-1]
    before = [one for one in made.callback_handler.callbacks if one is not held]
    takes_off.take_off = partial(made.remove_callback, held)
    made.train()
    assert held.tracer is not None
    assert [record.step for record in held.tracer.history] == steps
    assert not held.tracer.attached
    assert not forgotten.are_attached(besides=None)
    assert made.callback_handler.callbacks == before
    assert [*made.model._forward_pre_hooks, *made.model.layer._forward_pre_hooks] == []
    assert not any(has for step, has in board.has_figures.items() if step > takes_off.when[1])
    takes_off.take_off = bool
    dropped = weakref.ref(held)
    del held
    gc.collect()
    assert dropped() is None

"""The callback that every Trainer has under `memtrace run`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, trainer

from memtrace import MemTraceCallback
from memtrace.launch.loaded import LAUNCHED
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
        arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=3, **settings)
        samples = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(32)]
        return Trainer(Regression(), arguments, train_dataset=samples, callbacks=callbacks)

    return make


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


def test_outputs_that_cannot_be_used_under_trainer(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost the tracing and a warning, not the training."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMTRACE_LOG_DIR", str(tmp_path / "file"))
    made = make([])
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        made.train()
    assert made.state.global_step == 3
    assert "memtrace: this run is not traced, training goes on: the step log" in caplog.text

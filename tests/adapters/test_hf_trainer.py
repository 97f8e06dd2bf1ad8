"""The callback in a real Trainer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from memtrace import Category, ConfigError, MemTraceCallback, Moment
from memtrace.errors import OutputError

QUIET = {"port": None, "strict": True}


class Rows(torch.utils.data.Dataset):
    """Random token rows with labels, the same each time."""

    def __init__(self, count: int = 32, length: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        self._ids = torch.randint(0, 100, (count, length), generator=generator)
        self._labels = torch.randint(0, 2, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._labels[index]}


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    return BertForSequenceClassification(config)


def make_trainer(tmp_path, *callbacks: TrainerCallback, model: nn.Module | None = None, **arguments) -> Trainer:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers before 5 leaves that of the Trainer before
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 2,
        "seed": 11,
        **arguments,
    }
    return Trainer(
        model=model or make_model(),
        args=TrainingArguments(**settings),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "accumulation", "bf16", "checkpointing-eval"],
)
def test_run_is_recorded_and_undisturbed(tmp_path, arguments: dict) -> None:
    """Each step is recorded with its number and batch; losses and weights are bit for bit those without memtrace."""
    bare = make_trainer(tmp_path, **arguments)
    bare.train()
    callback = MemTraceCallback(trace_every=1, **QUIET)
    trainer = make_trainer(tmp_path, callback, **arguments)
    trainer.train()

    assert losses(trainer) == losses(bare)
    for left, right in zip(trainer.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(left, right)

    records = callback.tracer.history
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record.traced for record in records)
    micro_batches = arguments.get("gradient_accumulation_steps", 1)
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    for record in records:
        assert record.batch.shape == (4, 16)
        assert record.batch.tokens == 64 * micro_batches
        assert record.batch.largest_micro_batch_tokens == 64
        for breakdown in record.moments.values():
            assert breakdown.total_bytes == breakdown.allocated_bytes
            assert breakdown[Category.WEIGHTS] == weights
        assert record.moments[Moment.BACKWARD_END][Category.GRADIENTS] == weights
        assert record.moments[Moment.STEP_END][Category.GRADIENTS] == 0, "Trainer has set gradients to zero by then"
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
    assert records[-1].moments[Moment.STEP_END][Category.OPTIMIZER_STATE] > 2 * weights
    assert (records[-1].moments[Moment.PEAK][Category.TRANSIENT_WEIGHTS] > 0) == ("bf16" in arguments)


def test_nothing_is_left_after_training(tmp_path) -> None:
    """No hook, thread or port stays behind a finished run."""
    model = make_model()
    trainer = make_trainer(tmp_path, MemTraceCallback(port=0, strict=True), model=model)
    trainer.train()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("memtrace")]
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_step_log_goes_to_the_output_directory_and_the_table_is_shown_once(tmp_path) -> None:
    """Without any setting the log lies in `<output_dir>/memtrace`, and stderr gets one table."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        make_trainer(tmp_path, MemTraceCallback(strict=True, port=0), disable_tqdm=False).train()
    assert (tmp_path / "out" / "memtrace" / "steps-rank0.jsonl").read_text().count("\n") == 6
    assert stderr.getvalue().count("optimizer_state") >= 1
    assert stderr.getvalue().count("master_weights") <= 1


def test_callback_heals_after_a_crash_and_serves_a_second_run(tmp_path) -> None:
    """A run that raised never calls `on_train_end`; the next run of the same callback starts anew."""

    class Crash(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 3:
                raise RuntimeError("crash")

    crash = Crash()
    callback = MemTraceCallback(**QUIET)
    model = make_model()
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(tmp_path, callback, crash, model=model).train()
    crash.armed = False
    make_trainer(tmp_path, callback, crash, model=model).train()
    assert [record.step for record in callback.tracer.history] == [1, 2, 3, 4, 5, 6]
    assert not any(module._forward_hooks for module in model.modules())


def test_callback_given_twice_counts_apart(tmp_path) -> None:
    """Two callbacks do not disturb each other or the run: one of them traces, the other one counts."""
    first, second = MemTraceCallback(**QUIET), MemTraceCallback(**QUIET)
    bare = make_trainer(tmp_path)
    bare.train()
    trainer = make_trainer(tmp_path, first, second)
    trainer.train()
    assert losses(trainer) == losses(bare)
    assert len(first.tracer.history) == len(second.tracer.history) == 6


def test_resumed_run_goes_on_counting(tmp_path) -> None:
    """Steps keep Trainer's own numbers after a resume from a checkpoint."""
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    callback = MemTraceCallback(**QUIET)
    make_trainer(tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert [record.step for record in callback.tracer.history] == [4, 5, 6]
    assert callback.tracer.history[0].traced, "the state of the optimizer is there from the first step on"


def test_fault_inside_memtrace_never_reaches_training(tmp_path, monkeypatch, caplog) -> None:
    """One fault costs one log entry and memtrace itself; the run ends as without it."""
    from memtrace.attribution.step_in_progress import StepInProgress

    def broken(self, batch):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(StepInProgress, "forward_begins", broken)
    bare = make_trainer(tmp_path)
    bare.train()
    callback = MemTraceCallback(port=None)
    trainer = make_trainer(tmp_path, callback)
    with caplog.at_level(logging.ERROR, logger="memtrace"):
        trainer.train()
    assert losses(trainer) == losses(bare)
    assert callback.tracer.snapshot().up is False
    assert len([record for record in caplog.records if record.name == "memtrace"]) == 1


@pytest.mark.parametrize(("settings", "error"), [({"port": 70000}, ConfigError), ({"colour": 1}, ConfigError)])
def test_bad_settings_are_refused_at_once(settings: dict, error: type[Exception]) -> None:
    """The constructor raises, long before training."""
    with pytest.raises(error):
        MemTraceCallback(**settings)


def test_unwritable_log_directory_is_refused_before_the_first_step(tmp_path) -> None:
    """Training does not begin with an output that was asked for and cannot be had."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(OutputError):
        make_trainer(tmp_path, MemTraceCallback(log_dir=blocker / "logs", **QUIET), model=model).train()
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))
    assert not model._forward_hooks

"""Real failing allocations under Trainer: restarts of auto_find_batch_size, and a crash of the script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_training import GreedyGradient, ask_for_too_much
from test_hf_trainer import QUIET, Rows, make_model, make_trainer
from transformers import Trainer, TrainingArguments

from memtrace import MemTraceCallback
from memtrace.record.categories import Phase
from memtrace.record.oom.document import parse_report
from memtrace.record.oom.report import OomReport, RemedyKind, Witness
from memtrace.record.strict_json import parse_json

CRASH = """
import sys
from pathlib import Path
directory = Path(sys.argv[1])
from test_oom_under_trainer import make_greedy_trainer
make_greedy_trainer(directory, "backward", largest=0, textfile_dir=directory / "textfile").train()
"""


class GreedyTrainer(Trainer):
    """Runs out of memory in its third step when the micro batch is larger than `largest`."""

    place: str
    largest: int
    too_large: list[int]
    """The micro batches that did not fit."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if self.state.global_step == 2 and len(inputs["labels"]) > self.largest:
            self.too_large.append(len(inputs["labels"]))
            self._run_out()
        return super().training_step(model, inputs, *args)

    def _run_out(self) -> None:
        layer = self.model.bert.encoder.layer[1].output

        def fail(*_: Any) -> None:
            handle.remove()
            ask_for_too_much()

        def fail_later(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return GreedyGradient.apply(output)

        if self.place == "forward":
            handle = layer.register_forward_pre_hook(fail)
        elif self.place == "backward":
            handle = layer.register_forward_hook(fail_later)
        else:
            handle = self.optimizer.optimizer.register_step_pre_hook(fail)


def make_greedy_trainer(tmp_path: Path, place: str, *, largest: int, auto: bool = False, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        auto_find_batch_size=auto,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = MemTraceCallback(port=None, strict=True, trace_every=0, **settings)
    trainer = GreedyTrainer(model=make_model(), args=arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.place, trainer.largest, trainer.too_large = place, largest, []
    return trainer


def reports_in(tmp_path: Path) -> list[OomReport]:
    files = sorted((tmp_path / "out" / "memtrace").glob("oom-rank0-*.json"))
    return [parse_report(parse_json(path.read_bytes(), path.name), path.name) for path in files]


@pytest.mark.parametrize(
    ("place", "witness"),
    [("forward", Witness.EXCEPTION), ("backward", Witness.RESTART), ("optimizer", Witness.RESTART)],
)
def test_each_restart_of_auto_find_batch_size_has_one_report(tmp_path: Path, place: str, witness: Witness) -> None:
    """Batches of 4 and of 2 do not fit, and of 3 where accelerate tries it, 1 does: training ends as it should."""
    trainer = make_greedy_trainer(tmp_path, place, largest=1, auto=True)
    trainer.train()
    assert trainer.state.global_step == 4
    reports = reports_in(tmp_path)
    assert trainer.too_large in ([4, 3, 2], [4, 2])
    assert [report.batch.shape[0] for report in reports] == trainer.too_large
    for report in reports:
        assert report.request.phase is Phase(place)
        assert report.request.witness is witness
        assert report.step == 3
        assert report.holders[0].name.startswith("bert.")


def test_crash_of_the_script_is_reported_before_the_traceback(tmp_path: Path) -> None:
    """An exception that ends the process has its report, its note in the traceback, and its count in the text file."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)],
        env={"PYTHONPATH": os.pathsep.join([str(tests / "adapters"), *sys.path]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "can't allocate memory" in done.stderr
    assert "memtrace: out of memory at step 3" in done.stderr
    (report,) = reports_in(tmp_path)
    assert report.request.witness is Witness.EXCEPTION
    assert report.request.phase is Phase.BACKWARD
    (file,) = (tmp_path / "textfile").glob("memtrace-*-rank0.prom")
    text = file.read_text()
    assert re.search(r'^memtrace_ooms_total{rank="0",run="[^"]+",run_id="[^"]+"} 1.0$', text, re.MULTILINE)
    assert re.search(r'^memtrace_steps_total{rank="0",run="[^"]+",run_id="[^"]+"} 2.0$', text, re.MULTILINE)
    assert re.search(r'^memtrace_up{rank="0",run="[^"]+",run_id="[^"]+"} 0.0$', text, re.MULTILINE)


def test_second_training_after_a_run_that_ended_well_reports_nothing(tmp_path: Path) -> None:
    """A new on_train_begin without a step in progress is an ordinary second run."""
    callback = MemTraceCallback(**QUIET)
    for _ in range(2):
        make_trainer(tmp_path, callback, max_steps=2, auto_find_batch_size=True, model=make_model()).train()
    assert reports_in(tmp_path) == []
    assert callback.tracer.snapshot().totals.ooms == 0


class GathersOnTheDevice(Trainer):
    """Runs out of memory where the logits of all batches are put together, after `good` of them."""

    good = 2

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.good == 0:
            ask_for_too_much()  # as the concatenation of all logits does
        self.good -= 1
        return super().prediction_step(*args, **kwargs)


@pytest.mark.parametrize("ends", ["evaluation", "prediction"])
def test_memory_that_runs_out_in_evaluation_is_named(tmp_path: Path, ends: str) -> None:
    """The report says that it was no training step, and that Trainer can gather its logits on the host."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_eval_batch_size=4, eval_strategy="steps",
        eval_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = MemTraceCallback(port=None, strict=True, trace_every=0)
    trainer = GathersOnTheDevice(
        model=make_model(), args=arguments, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=[callback]
    )
    if ends == "prediction":
        trainer.good = 10**6
        trainer.train()
        trainer.good = 1
        callback.tracer.attach()
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        trainer.train() if ends == "evaluation" else trainer.predict(Rows(16))
    callback.tracer.report_failure(caught.value)
    callback.tracer.detach()
    (report,) = reports_in(tmp_path)
    assert report.request.evaluation
    assert report.request.phase is Phase.OUTSIDE
    assert "in an evaluation or a prediction" in caught.value.__notes__[0]
    (remedy,) = [one for one in report.remedies if one.kind is RemedyKind.EVAL_ACCUMULATION]
    assert "eval_accumulation_steps" in remedy.advice
    assert remedy.saved_bytes >= report.request.requested_bytes
    assert RemedyKind.UNATTRIBUTED not in {one.kind for one in report.remedies}

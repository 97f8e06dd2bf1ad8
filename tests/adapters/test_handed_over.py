"""What Trainer hands over, however odd, never ends a training run; what the user wrote wrongly still does."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from memtrace import Category, MemTraceCallback, Moment
from memtrace.adapters.output_directory import log_directory
from memtrace.errors import OutputError

QUIET: dict[str, Any] = {"port": None, "device_poll_seconds": 0, "strict": True, "trace_every": 1}
STEPS = 3


class Classifier(nn.Module):
    """One layer with a loss, called as models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(rows)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class PartlyOnMeta(Classifier):
    """Has a part without memory that no forward pass uses, larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = nn.Linear(100, 100, device="meta")

    def to(self, *_: Any, **__: Any) -> PartlyOnMeta:
        """What has no memory cannot be moved."""
        return self


class Skips(torch.optim.Optimizer):
    """Wraps an optimizer without a call of `Optimizer.__init__`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.wrapped = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.wrapped.param_groups

    @property
    def state(self) -> Any:
        return self.wrapped.state

    def state_dict(self) -> dict[str, Any]:
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wrapped.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.wrapped.step(closure)


class Hides(Skips):
    """The same, with the inner optimizer in a function."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = lambda: inner

    @property
    def wrapped(self) -> torch.optim.Optimizer:
        return self._inner()


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.device.type != "meta"], lr=0.01)


def _layer_wise(model: nn.Module) -> torch.optim.Optimizer:
    inner = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}

    def update(parameter: torch.Tensor) -> None:
        inner[parameter].step()
        inner[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return LayerWiseDummyOptimizer(optimizer_dict=inner)


def _schedule_free(model: nn.Module) -> Any:
    from schedulefree import ScheduleFreeWrapper

    optimizer = ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.train()
    return optimizer


def _never(_: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda step: 1.0)


def _rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"rows": torch.randn(4, generator=generator), "labels": number % 2} for number in range(16)]


def _trainer(directory: Any, *callbacks: TrainerCallback, model: nn.Module, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(directory / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, callbacks=list(callbacks), **({"train_dataset": _rows()} | more))


def _run(
    directory: Any,
    optimizer: Callable[[nn.Module], Any],
    kind: Callable[[], nn.Module] = Classifier,
    *callbacks: TrainerCallback,
) -> list[list[float]]:
    """Returns the weights after training."""
    torch.manual_seed(0)
    model = kind()
    given = optimizer(model)
    trainer = _trainer(directory, *callbacks, model=model, optimizers=(given, _never(given)))
    trainer.train()
    return [p.tolist() for p in model.parameters() if p.device.type != "meta"]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message for record in caplog.records if record.levelno >= logging.WARNING and "memtrace" in record.name
    ]


FOUND = {
    # optimizer: bytes of its state for each byte of the weights, without step counters
    "layer-wise dummy": (_layer_wise, 2),
    "ScheduleFreeWrapper": (_schedule_free, 1),
    "no Optimizer.__init__": (lambda model: Skips(_adamw(model)), 2),
}
UNKNOWN = {
    "no Optimizer.__init__, held where nobody can look": lambda model: Hides(_adamw(model)),
    "another model's": lambda model: _adamw(Classifier()),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_real_optimizers_are_found(name: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Training is as without memtrace, and the state is counted."""
    optimizer, ratio = FOUND[name]
    callback = MemTraceCallback(**QUIET)
    assert _run(tmp_path, optimizer, Classifier, callback) == _run(tmp_path, optimizer)
    assert callback.tracer is not None
    record = callback.tracer.latest
    assert record is not None
    assert record.step == STEPS
    weights = record.moments[Moment.STEP_END][Category.WEIGHTS]
    state = record.moments[Moment.STEP_END][Category.OPTIMIZER_STATE]
    assert ratio * 40 <= state < ratio * 40 + 16
    assert weights in (40, 44)  # the layer-wise dummy has a tensor of its own
    assert not _warnings(caplog)


@pytest.mark.parametrize("name", UNKNOWN)
def test_optimizers_that_cannot_be_followed(name: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One warning; training goes on, weights and activations are counted in every step, state is not."""
    callback = MemTraceCallback(**QUIET)
    assert _run(tmp_path, UNKNOWN[name], Classifier, callback) == _run(tmp_path, UNKNOWN[name])
    assert len(_warnings(caplog)) == 1
    assert "its state is not counted" in _warnings(caplog)[0]
    assert callback.tracer is not None
    assert [record.step for record in callback.tracer.history] == [1, 2, 3]
    for record in callback.tracer.history:
        assert record.traced
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
        assert record.moments[Moment.STEP_END][Category.WEIGHTS] == 40


def test_a_model_partly_on_meta(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What has no memory is not counted, and does not decide which device is watched."""
    callback = MemTraceCallback(**QUIET)
    assert _run(tmp_path, _adamw, PartlyOnMeta, callback) == _run(tmp_path, _adamw, PartlyOnMeta)
    assert callback.tracer is not None
    record = callback.tracer.latest
    assert record is not None
    assert record.device == "cpu"
    assert record.moments[Moment.STEP_END][Category.WEIGHTS] == 40
    assert not _warnings(caplog)


@pytest.mark.parametrize("model", [nn.Linear(2, 2, device="meta"), nn.Tanh()], ids=["on meta", "no parameters"])
def test_a_model_without_memory(model: nn.Module, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be traced: one warning, and every later event of the run is let pass."""
    callback = MemTraceCallback(**QUIET)
    trainer = _trainer(tmp_path, callback, model=Classifier())
    arguments = trainer.args, trainer.state, trainer.control
    callback.on_train_begin(*arguments, model=model, optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1))
    for event in (callback.on_step_begin, callback.on_step_end, callback.on_train_end):
        event(*arguments)
    assert callback.tracer is None
    assert len(_warnings(caplog)) == 1
    assert "this run is not traced, training goes on" in _warnings(caplog)[0]


class _Raises:
    """A value that can be asked for nothing."""

    def __len__(self) -> int:
        raise RuntimeError("no length")


def _table(length: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"rows": [[1.0] * 4] * 16, "labels": [0, 1] * 8, "length": length})


DATASETS: dict[str, Callable[[], Any]] = {
    "lengths with nulls": lambda: _table([None, *range(15)]),
    "lengths that are all null": lambda: _table([None] * 16),
    "lengths as text": lambda: _table(["12"] * 16),
    "lengths as fractions": lambda: _table([1.5, float("nan")] * 8),
    "lengths as lists": lambda: _table([[1, 2]] * 16),
    "lengths below zero": lambda: _table([-3] * 16),
    "samples whose tokens raise": lambda: [{**row, "input_ids": _Raises()} for row in _rows()],
    "tokens without a length": lambda: [{**row, "input_ids": torch.tensor(1)} for row in _rows()],
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_that_tell_no_lengths(name: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on, memtrace stays up, and nothing is said."""
    callback = MemTraceCallback(**QUIET)
    trainer = _trainer(tmp_path, callback, model=Classifier(), train_dataset=DATASETS[name]())
    trainer.train()
    assert callback.tracer is not None
    assert callback.tracer.snapshot().up
    assert len(callback.tracer.history) == STEPS
    assert not _warnings(caplog)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
@pytest.mark.parametrize("when", ["before", "after", "during"])
def test_copies_and_pickles(copied: Callable[[Any], Any], when: str, tmp_path: Any) -> None:
    """They have the settings and no run, and can be used for another one."""
    made: list[MemTraceCallback] = []

    class During(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if when == "during" and not made:
                made.append(copied(callback))

    callback = MemTraceCallback(**QUIET)
    if when == "before":
        made.append(copied(callback))
    _trainer(tmp_path, callback, During(), model=Classifier()).train()
    if when == "after":
        made.append(copied(callback))
    (copy_of_it,) = made
    assert copy_of_it.tracer is None
    _trainer(tmp_path / "again", copy_of_it, model=Classifier()).train()
    assert copy_of_it.tracer is not None
    assert len(copy_of_it.tracer.history) == len(callback.tracer.history) == STEPS


class Hub(HfApi):
    """Lists what would be uploaded, as huggingface_hub does it, and uploads nothing."""

    uploaded: list[list[str]]

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, folder_path: Any, ignore_patterns: Any = None, **_: Any) -> Any:
        operations = self._prepare_upload_folder_additions(folder_path, "", ignore_patterns=ignore_patterns)
        self.uploaded.append([operation.path_in_repo for operation in operations])
        return type("Done", (), {"is_done": lambda self: True, "done": lambda self: True})()


@pytest.mark.parametrize("log_dir", ["default", "there already"])
def test_the_log_is_not_uploaded(log_dir: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`push_to_hub` leaves the log directory out; it lies where it should all the same.

    A plain directory from an earlier run is left as it was.
    """
    hub = Hub()
    hub.uploaded = []
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    else:  # before transformers 5.17
        monkeypatch.setattr("transformers.trainer.create_repo", hub.create_repo)
        monkeypatch.setattr("transformers.trainer.upload_folder", hub.upload_folder)
    monkeypatch.setattr(Trainer, "create_model_card", lambda *_, **__: None)
    if log_dir == "there already":
        (tmp_path / "out" / "memtrace").mkdir(parents=True)
    trainer = _trainer(tmp_path, MemTraceCallback(**QUIET), model=Classifier())
    trainer.train()
    assert (tmp_path / "out" / "memtrace" / "steps-rank0.jsonl").read_text().count("\n") == STEPS
    trainer.push_to_hub()
    (names,) = hub.uploaded
    assert "model.safetensors" in names
    logs = [name for name in names if "memtrace" in name]
    assert bool(logs) == (log_dir == "there already")


class TestLogDirectory:
    def test_is_made_once(self, tmp_path: Any) -> None:
        """Every rank calls it, and so does a run that is resumed."""
        assert [log_directory(tmp_path / "out") for _ in range(2)] == [tmp_path / "out" / "memtrace"] * 2
        assert (tmp_path / "out" / "memtrace").is_symlink()
        assert (tmp_path / "out" / "_memtrace").is_dir()

    def test_a_target_that_was_deleted_is_made_again(self, tmp_path: Any) -> None:
        """The link is still there, and leads nowhere."""
        (log_directory(tmp_path) / "kept").touch()
        (tmp_path / "_memtrace" / "kept").unlink()
        (tmp_path / "_memtrace").rmdir()
        assert log_directory(tmp_path).is_dir()

    def test_where_links_cannot_be_made(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The directory is a plain one, made by whoever writes into it."""

        def refuses(*_: Any, **__: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr("pathlib.Path.symlink_to", refuses)
        _trainer(tmp_path, MemTraceCallback(**QUIET), model=Classifier()).train()
        assert (tmp_path / "out" / "memtrace" / "steps-rank0.jsonl").exists()
        assert not (tmp_path / "out" / "memtrace").is_symlink()

    def test_a_file_in_its_place_is_an_error(self, tmp_path: Any) -> None:
        """An output that was asked for and cannot be had, before the first step."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "memtrace").touch()
        with pytest.raises(OutputError):
            _trainer(tmp_path, MemTraceCallback(**QUIET), model=Classifier()).train()

"""The models that a Trainer holds beside the trained one, and those that the user names."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from memtrace import Category, MemTraceCallback, MemTraceOptimizer, Moment
from memtrace.adapters.lightning import MemTraceLightningCallback
from memtrace.record.breakdown import StepRecord

SETTINGS = {"port": None, "strict": True, "step_log": False, "device_poll_seconds": 0, "trace_every": 0}
WIDTH = 8
BYTES = 4 * (WIDTH * WIDTH + WIDTH)


class Net(nn.Module):
    """One layer, with a loss as models of transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


class Module(LightningModule):
    """What Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(rows)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def fit(directory: Path, module: Module, *callbacks: Callback, epochs: int = 1) -> None:
    LightningTrainer(
        callbacks=list(callbacks), max_epochs=epochs, limit_train_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory, accelerator="cpu",
    ).fit(module, torch.utils.data.DataLoader(torch.ones(4, WIDTH)))  # fmt: skip


def frozen() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def weights(record: StepRecord | None) -> dict[str, int]:
    assert record is not None
    found = Counter[str]()
    for key, size in record.moments[Moment.STEP_END].entries.items():
        if key.category is Category.WEIGHTS:
            found[key.component] += size
    return dict(found)


class KeepsCopy(TrainerCallback):
    """A callback with a model of its own."""

    def __init__(self) -> None:
        self.ema_model = frozen()


class Jealous(nn.Linear):
    """A model that is compared with nothing."""

    __hash__ = nn.Linear.__hash__

    def __eq__(self, other: object) -> bool:
        raise TypeError("compared")


class Closed(list):
    """A list that cannot be gone through."""

    def __iter__(self) -> Iterator[object]:
        raise LookupError("closed")


class Proxy:
    """Stands for something that is not there yet."""

    @property
    def __class__(self) -> type:
        raise RuntimeError("unbound")


def test_the_models_of_a_trainer_have_the_names_of_its_attributes(tmp_path):
    """As TRL's trainers hold them, lists of reward functions among them; the run keeps none of them afterwards.

    What cannot be looked at is no model, nor is a long list, which is data.
    """

    def run() -> list[weakref.ref]:
        model = Net()
        student = SimpleNamespace(teacher=frozen())
        callback = MemTraceCallback(further_models={"teacher": student.teacher}, **SETTINGS)
        assert pickle.loads(pickle.dumps(callback)).tracer is None
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
            ),
            train_dataset=[{"x": torch.ones(WIDTH)}] * 16,
            callbacks=[callback, KeepsCopy()],
        )
        trainer.ref_model, trainer.reward_funcs, trainer._value_model = frozen(), [frozen(), len, frozen()], frozen()
        trainer.wrapped = nn.ModuleList([model])
        trainer.closed, trainer.proxy, trainer.samples = Closed([frozen()]), Proxy(), [frozen()] * 1000
        trainer.judge = [Jealous(WIDTH, WIDTH)]
        trainer.train()
        seen = weights(callback.tracer.latest)
        assert seen.pop("trainable") == BYTES
        assert seen == {
            "ref_model": BYTES, "reward_funcs": 2 * BYTES, "value_model": BYTES, "ema_model": BYTES,
            "judge": BYTES, "teacher": BYTES,
        }  # fmt: skip
        return [weakref.ref(thing) for thing in (trainer, trainer.ref_model, model, student.teacher)]

    kept = run()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4


def test_the_wrapper_and_lightning_take_names_too(tmp_path):
    """One argument everywhere: `further_models`."""
    model, teacher = Net(), frozen()
    optimizer = MemTraceOptimizer(
        torch.optim.SGD(model.parameters()), model, further_models={"teacher": teacher}, **SETTINGS
    )
    model(torch.ones(2, WIDTH))["loss"].backward()
    optimizer.step()
    optimizer.close()
    assert weights(optimizer.tracer.latest) == {"trainable": BYTES, "teacher": BYTES}

    callback = MemTraceLightningCallback(further_models={"teacher": teacher}, **SETTINGS)
    fit(tmp_path, Module(), callback)
    assert weights(callback.tracer.latest) == {"trainable": BYTES, "teacher": BYTES}


def test_the_models_of_lightning_have_the_names_of_attributes(tmp_path):
    """The averages of its callbacks, and a teacher that is no submodule so as not to be trained; the run keeps none."""

    class Averages(Callback):
        def __init__(self) -> None:
            self.ema = None

        def on_fit_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
            self.ema = torch.optim.swa_utils.AveragedModel(pl_module.net)

    def run() -> list[weakref.ref]:
        module, averages = Module(), Averages()
        module.teachers = (frozen(), frozen())
        callback = MemTraceLightningCallback(**SETTINGS)
        fit(tmp_path, module, StochasticWeightAveraging(1e-3, swa_epoch_start=1), averages, callback, epochs=2)
        seen = weights(callback.tracer.latest)
        assert seen == {"trainable": BYTES, "teachers": 2 * BYTES, "ema": BYTES + 8, "average_model": BYTES}
        return [weakref.ref(thing) for thing in (module, averages.ema, *module.teachers)]

    kept = run()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4

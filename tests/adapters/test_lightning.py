"""The Lightning callback, in a real Trainer on the CPU."""

from __future__ import annotations

import copy
import csv
import gc
import json
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memtrace.adapters.lightning import MemTraceLightningCallback, trained_module
from memtrace.exporters.run_directory.run_file import read_run_file, run_file_path
from memtrace.launch.lightning_callback import RunLightningCallback
from memtrace.record.categories import Category, Moment

FEATURES, HIDDEN = 32, 64
PARAMETERS = FEATURES * HIDDEN + HIDDEN + HIDDEN + 1
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


class Regression(pl.LightningModule):
    """One network, called by `training_step`; can fail at a batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.losses: list[float] = []
        self._fail_at = fail_at

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self._fail_at:
            raise RuntimeError("out of data")
        loss = self.network(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(0))), 4)


def fit(directory: Any, callbacks: list[Any], *, fail_at: int | None = None) -> Regression:
    torch.manual_seed(0)
    model = Regression(fail_at)
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks, default_root_dir=directory, **QUIET
    )
    trainer.fit(model, loader(), loader())
    return model


def callback() -> MemTraceLightningCallback:
    return MemTraceLightningCallback(strict=True, port=0, device_poll_seconds=0)


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestFit:
    def test_a_step_is_an_optimizer_step(self, tmp_path):
        """Eight batches, of which two are accumulated each, are four steps; one of them at least is traced."""
        watched = callback()
        fit(tmp_path, [watched])
        records = [json.loads(line) for line in (tmp_path / "memtrace" / "steps-rank0.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        assert any(record["traced"] for record in records)
        assert {record["batch"]["tokens"] for record in records} == {2 * 4 * FEATURES}

    def test_categories_have_their_closed_form(self, tmp_path):
        """Weights, gradients and both moments have four bytes a parameter; law 1 at every moment."""
        watched = callback()
        fit(tmp_path, [watched])
        record = next(record for record in watched.tracer.history if record.traced)
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
            assert moment[Category.WEIGHTS] == 4 * PARAMETERS
        end = record.moments[Moment.BACKWARD_END]
        assert end[Category.GRADIENTS] == 4 * PARAMETERS
        assert end[Category.OPTIMIZER_STATE] == 8 * PARAMETERS + 4 * 4
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0

    def test_training_is_the_same(self, tmp_path):
        """Losses and weights have the bits of the run without the callback."""
        plain, watched = fit(tmp_path, []), fit(tmp_path, [callback()])
        assert watched.losses == plain.losses
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))

    def test_a_run_that_fails_leaves_nothing_behind(self, tmp_path):
        """The port and the hooks are given back, and the callback can be used again."""
        watched = callback()
        with pytest.raises(RuntimeError, match="out of data"):
            fit(tmp_path, [watched], fail_at=5)
        assert not watched.tracer.attached
        fit(tmp_path, [watched])
        assert watched.tracer.latest.step == 4

    def test_a_module_is_let_go_when_it_is_dropped(self, tmp_path):
        """Law 8: Trainer's handler of SIGTERM, which knows the module, goes with the run. The tracer may be kept."""
        watched = callback()
        dropped = weakref.ref(fit(tmp_path, [watched]))
        tracer = watched.tracer
        del watched  # Lightning gives it the module's `log`
        gc.collect()
        assert dropped() is None
        assert tracer.latest.step == 4

    def test_a_callback_of_the_script_that_comes_for_the_second_run(self, tmp_path, capsys):
        """What the one of `memtrace run` had of the first run is over: one tracer, and its table alone."""
        ours, watched = RunLightningCallback(strict=True, port=None), callback()
        fit(tmp_path, [ours])
        assert ours.tracer.latest.step == 4
        capsys.readouterr()
        fit(tmp_path, [ours, watched])
        assert watched.tracer.latest.step == 4
        assert ours.tracer is None
        assert capsys.readouterr().err.count("sizes in MiB") == 1


def test_the_one_network_of_a_module_is_what_is_watched():
    """Lightning calls `training_step`, which calls the network."""
    model = Regression()
    assert trained_module(model) is model.network


def test_a_module_with_several_networks_is_watched_itself():
    """None of them has all the parameters."""
    model = pl.LightningModule()
    model.encoder, model.decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    assert trained_module(model) is model


class Odd(Regression):
    """Regression with other optimizers."""

    def __init__(self, optimizers: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = optimizers

    def configure_optimizers(self) -> Any:
        return self._make(self)


class Manual(Regression):
    """Steps two optimizers itself, one for each layer, as adversarial training does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.network(batch[0]).square().mean()
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.network[0].parameters()), torch.optim.SGD(self.network[2].parameters(), lr=0.1)]


def _with_scheduler(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters())
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def _around_another(module: Any) -> Any:
    """A torch optimizer that holds no parameter of the model, and steps another one that does."""

    class Outer(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.zeros(1)], {})
            self.base_optimizer = torch.optim.AdamW(module.parameters())

        def step(self, closure: Any = None) -> Any:
            return self.base_optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.base_optimizer.zero_grad(set_to_none)

    return Outer()


HANDED_OVER: dict[str, tuple[Callable[[], pl.LightningModule], int | None, int]] = {
    # what is trained, bytes of optimizer state for each parameter (None: of some), warnings
    "with a scheduler": (lambda: Odd(_with_scheduler), 8, 0),
    "around another one": (lambda: Odd(_around_another), 8, 0),
    "two, stepped by hand": (Manual, None, 0),
    "none": (lambda: Odd(lambda _: None), 0, 1),
    "another model's": (lambda: Odd(lambda _: torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)), 0, 1),
}


def train(directory: Any, module: pl.LightningModule, callbacks: list[Any]) -> list[list[float]]:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    pl.Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=directory, **QUIET).fit(module, loader())
    return [parameter.tolist() for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
class TestHandedOver:
    @pytest.mark.parametrize("name", HANDED_OVER)
    def test_optimizers_of_every_kind(self, name, tmp_path, caplog):
        """Training is the same and never ends for them; what cannot be followed costs one warning."""
        make, state, warnings = HANDED_OVER[name]
        watched = MemTraceLightningCallback(strict=True, port=None, device_poll_seconds=0, trace_every=1)
        module, bare = make(), make()
        assert train(tmp_path, module, [watched]) == train(tmp_path, bare, [])
        assert module.losses == bare.losses
        said = [r for r in caplog.records if r.name == "memtrace" and r.levelno >= logging.WARNING]
        assert len(said) == warnings
        assert watched.tracer is not None
        assert not watched.tracer.attached
        if name != "none":  # Lightning counts no step then
            end = watched.tracer.latest.moments[Moment.STEP_END]
            assert end[Category.WEIGHTS] >= 4 * PARAMETERS
            found = end[Category.OPTIMIZER_STATE]
            assert found > 0 if state is None else state * PARAMETERS <= found <= state * PARAMETERS + 16

    def test_a_module_without_memory(self, tmp_path, caplog):
        """Nothing can be traced: one warning, and training goes on."""

        class Empty(pl.LightningModule):
            def training_step(self, batch, batch_idx):
                return None

            def configure_optimizers(self):
                return None

        watched = callback()
        pl.Trainer(max_epochs=1, callbacks=[watched], default_root_dir=tmp_path, **QUIET).fit(Empty(), loader())
        assert watched.tracer is None
        assert "this run is not traced, training goes on" in caplog.text

    @pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), KeyboardInterrupt()])
    def test_exceptions(self, error, tmp_path):
        """Memory that ran out is reported; whatever it was, the callback lets go and can be used again."""

        class Fails(Regression):
            def training_step(self, batch, batch_idx):
                if batch_idx == 3:
                    raise error
                return super().training_step(batch, batch_idx)

        watched = callback()
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            train(tmp_path, Fails(), [watched])
        assert not watched.tracer.attached
        assert watched.tracer.snapshot().totals.ooms == (1 if isinstance(error, RuntimeError) else 0)
        status = read_run_file(run_file_path(tmp_path / "memtrace", 0))
        assert status.state == ("out_of_memory" if isinstance(error, RuntimeError) else "signal")
        train(tmp_path, Regression(), [watched])
        assert watched.tracer.latest.step == 8

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_copies_and_pickles(self, copied, tmp_path):
        """They have the settings and no run."""
        watched = callback()
        train(tmp_path, Regression(), [watched])
        other = copied(watched)
        assert other.tracer is None
        train(tmp_path / "other", Regression(), [other])
        assert len(other.tracer.history) == len(watched.tracer.history) == 8


class FailingLogger(CSVLogger):
    """A logger whose tracker cannot be reached."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route")


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestLoggers:
    def train(self, directory: Any, watched: MemTraceLightningCallback, *loggers: CSVLogger) -> pl.Trainer:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=1,
            accumulate_grad_batches=2,
            log_every_n_steps=2,
            callbacks=[watched],
            default_root_dir=directory,
            **QUIET | {"logger": list(loggers)},
        )
        trainer.fit(Regression(), loader())
        return trainer

    def test_figures_come_where_lightning_logs(self, tmp_path):
        """Steps 2 and 4 of four, at Lightning's own count; no checkpoint and no early stopping sees them."""
        watched = MemTraceLightningCallback(strict=True, port=None, device_poll_seconds=0, trace_every=1)
        trainer = self.train(tmp_path, watched, CSVLogger(tmp_path, name="csv", version=""))
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [1, 3]
        peaks = [record.moments[Moment.PEAK] for record in watched.tracer.history]
        for row, two in zip(rows, (peaks[:2], peaks[2:]), strict=True):
            highest = max(two, key=lambda peak: peak.held_bytes)
            assert float(row["memtrace/peak_gib"]) * 2**30 == highest.held_bytes
            assert float(row["memtrace/peak/weights_gib"]) * 2**30 == highest[Category.WEIGHTS]
        assert not [name for name in trainer.callback_metrics if "memtrace" in name]
        assert not [name for name in trainer.logged_metrics if "memtrace" in name]

    def test_a_tracer_that_the_script_detaches(self, tmp_path):
        """It has nothing new to say: the logs that follow have no figures, instead of those of before."""

        class Detaches(MemTraceLightningCallback):
            def on_train_batch_start(self, trainer, *arguments):
                super().on_train_batch_start(trainer, *arguments)
                if trainer.global_step == 3:
                    self.tracer.detach()

        watched = Detaches(strict=True, port=None, device_poll_seconds=0, trace_every=1)
        self.train(tmp_path, watched, CSVLogger(tmp_path, name="csv", version=""))
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == [1]

    def test_off_by_one_setting(self, tmp_path):
        """Then the loggers have what they have without memtrace: here nothing at all."""
        self.train(tmp_path, MemTraceLightningCallback(trackers=False, port=None), CSVLogger(tmp_path, name="csv"))
        assert not list(tmp_path.rglob("metrics.csv"))

    def test_a_logger_that_fails_is_said_once(self, tmp_path, caplog):
        """The training comes to its end."""
        watched = MemTraceLightningCallback(strict=True, port=None, device_poll_seconds=0)
        with caplog.at_level(logging.ERROR, "memtrace"):
            trainer = self.train(tmp_path, watched, FailingLogger(tmp_path))
        assert trainer.global_step == 4
        (said,) = [record.message for record in caplog.records]
        assert said.startswith("memtrace: a logger of Lightning that was given figures of memory has failed")


class Adversaries(pl.LightningModule):
    """Optimizes by itself: one network after two batches, or a generator and a discriminator in turns."""

    def __init__(self, *, in_turns: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1)
        self.losses: list[float] = []
        self._in_turns = in_turns

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        if not self._in_turns:
            loss = self.discriminator(self.generator(batch[0])).square().mean()
            self.manual_backward(loss)
            if batch_idx % 2:
                self.clip_gradients(optimizers, 1.0, "norm")
                optimizers.step()
                optimizers.zero_grad()
            self.losses.append(loss.item())
            return
        for network, optimizer in zip((self.discriminator, self.generator), optimizers, strict=True):
            self.toggle_optimizer(optimizer)
            made = self.generator(batch[0])
            loss = self.discriminator(made.detach() if network is self.discriminator else made).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        made = [torch.optim.AdamW(network.parameters()) for network in (self.discriminator, self.generator)]
        return made if self._in_turns else torch.optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("in_turns", "steps"), [(False, 4), (True, 8)])
def test_manual_optimization(tmp_path, in_turns, steps):
    """A step is an update, or a cycle of both optimizers; losses and weights have the bits of the run without."""

    def run(*callbacks: Any) -> Adversaries:
        torch.manual_seed(0)
        model = Adversaries(in_turns=in_turns)
        pl.Trainer(max_epochs=1, callbacks=list(callbacks), default_root_dir=tmp_path, **QUIET).fit(model, loader())
        return model

    plain = run()
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    for settings in ({"trace_every": 1}, {}):
        watching = MemTraceLightningCallback(strict=True, port=None, device_poll_seconds=0, **settings)
        watched = run(watching)
        assert watched.losses == plain.losses
        assert all(torch.equal(*pair) for pair in zip(plain.parameters(), watched.parameters(), strict=True))
        records = watching.tracer.history
        assert len(records) == steps
        traced = [record for record in records if record.traced]
        assert len(traced) >= (steps - 1 if settings else 1)
        for moment in (moment for record in traced for moment in record.moments.values()):
            assert moment.total_bytes == moment.allocated_bytes
            assert moment[Category.WEIGHTS] == weights
            assert moment[Category.UNATTRIBUTED] <= 64
        end = traced[-1].moments[Moment.STEP_END]
        assert {key.component: n for key, n in end.entries.items() if "exp" in key.component} == {
            "exp_avg": weights,
            "exp_avg_sq": weights,
        }

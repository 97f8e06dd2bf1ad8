"""The callback for Lightning: `Trainer(callbacks=[MemTraceLightningCallback()])`. Needs the extra `lightning`."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memtrace.adapters.frameworks import attached_tracer, end_run
from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.adapters.trackers import Summary, hand_over, to_mlflow, to_tensorboard, to_wandb
from memtrace.attribution.models import holders
from memtrace.attribution.models.further import Find, FurtherModels
from memtrace.config import TracerConfig
from memtrace.exporters.trackers.figures import Figures
from memtrace.guard import Guard, Told, ask

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
else:  # the same, under the name of before
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


class MemTraceLightningCallback(Callback):
    """Traces what Lightning's Trainer trains, from `on_train_start` to the end of training.

    A step is an optimizer step: all batches that are accumulated for it. Metrics are served while training runs, the
    step log goes to `<default_root_dir>/memtrace`; a line says so, and the table is shown at the end. Lightning runs
    forward and backward pass in the closure of the optimizer's step, so that gradients of one step live until the
    backward pass of the next one. The loggers get figures of memory in the steps in which Lightning logs, and the table
    at the end: `trackers=False` is without. Copies and pickles have the settings, and no run.

    Models that other callbacks hold, such as an average of the weights, and those in attributes of the LightningModule
    that are no submodules, are found: each has the name of the attribute.

    Args:
        further_models: models beside those of the LightningModule, by name: see `tracer.Tracer`. Held weakly.
        **settings: fields of `TracerConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, or a further model holds no tensors.
    """

    def __init__(self, *, further_models: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self._config = TracerConfig.from_settings(settings)
        self._further = FurtherModels(further_models)
        self._tracer: MemoryTracer | None = None
        self._step: int | None = None
        self._figures = Figures()
        self._log = Told(_log, "a logger of Lightning that was given figures of memory")

    @property
    def tracer(self) -> MemoryTracer | None:
        """The tracer of the current or the last run; None before the first one."""
        return self._tracer

    def __getstate__(self) -> dict[str, Any]:
        without = {"_tracer": None, "_step": None, "_further": FurtherModels(), "_figures": Figures()}
        return {**vars(self), **without}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches a tracer. What cannot be traced of the model and the optimizers is logged.

        Raises:
            ConfigError: a file that a setting names cannot be used.
            OutputError: the port, the address or the log directory cannot be used.
        """
        guard = Guard(lambda: None, strict=self._config.strict)
        guard.set_up(lambda: self._begin(trainer, pl_module), undo=lambda: None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins a step with its first batch."""
        if self._tracer is not None and self._step is None:
            self._step = trainer.global_step
            self._tracer.begin_step(trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the step after the batch with which the optimizers have stepped."""
        if self._tracer is not None and self._step not in (None, trainer.global_step):
            self._step = None
            self._tracer.end_step()
            if self._config.trackers and self._tracer.attached and trainer.loggers:
                found = self._tracer.guarded(self._figures_of, trainer, self._tracer)
                if found is not None:
                    self._log(trainer.loggers, *found)

    def _figures_of(self, trainer: Trainer, tracer: MemoryTracer) -> tuple[dict[str, float], int] | None:
        """Returns figures where Lightning logs, with its count of steps: batches that have stepped, from 0."""
        step = trainer.global_step // max(1, len(trainer.optimizers)) - 1
        every: int = getattr(trainer, "log_every_n_steps", 0)  # set by Lightning where no type checker sees it
        return (self._figures.take(tracer.snapshot()), step) if every and (step + 1) % every == 0 else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches, and shows the table on the first process of each machine."""
        self._step = None
        if self._tracer is not None:
            if self._config.trackers and trainer.is_global_zero:
                takers = [taker for logger in trainer.loggers for taker in ask(list, _takers(logger)) or ()]
                self._tracer.guarded(hand_over, self._tracer, takers)
            end_run(self._tracer, self._config)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Reports the exception if memory has run out, and detaches, since training ends here."""
        if self._tracer is not None:
            self._tracer.report_failure(exception)
        self._end()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_before()
        model, log_dir = trained_module(pl_module), Path(trainer.default_root_dir) / "memtrace"
        further = self._further.also(_models_beside(trainer, pl_module))
        self._tracer = attached_tracer(model, trainer.optimizers, self._config, log_dir, further)
        self._figures = Figures()
        if self._tracer is not None:
            self._tracer.add_listener(self._figures.note)

    def _end_before(self) -> None:
        """Ends the run before, which may have had no `on_train_end`."""
        before, self._tracer, self._step = self._tracer, None, None
        if before is not None:
            before.give_way()

    def _end(self) -> None:
        self._step = None
        if self._tracer is not None:
            self._tracer.detach()


def _models_beside(trainer: Trainer, pl_module: LightningModule) -> Find:
    """Returns what finds the further models that callbacks and the LightningModule hold. Both are held weakly."""
    alive, module = weakref.ref(trainer), weakref.ref(pl_module)

    def find() -> Mapping[str, Any]:
        trainer, trained = alive(), module()
        if trainer is None or trained is None:
            return {}
        return holders.models_of((*trainer.callbacks, trained), trained)  # type: ignore[attr-defined]

    return find


def _log(loggers: list[Logger], figures: dict[str, float], step: int) -> None:
    for logger in loggers:
        logger.log_metrics(figures, step)


def _takers(logger: Logger) -> Iterator[Callable[[Summary], None]]:
    """Yields what hands a summary to the tracker of a logger, if it has a place for it."""
    if isinstance(logger, TensorBoardLogger):
        yield to_tensorboard(logger.experiment)
    elif isinstance(logger, WandbLogger):
        yield to_wandb(logger.experiment)
    elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
        yield to_mlflow(logger.experiment, logger.run_id)


def trained_module(module: nn.Module) -> nn.Module:
    """Returns the innermost module that has all the parameters.

    Lightning calls `training_step` and not the module itself; what `training_step` calls is mostly the one network
    that the module holds. A LightningModule with several is returned as it is: its steps are traced where
    `training_step` calls `self(...)`.
    """
    count = sum(1 for _ in module.parameters())
    for child in module.children():
        if sum(1 for _ in child.parameters()) == count and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            return trained_module(child) if isinstance(child, LightningModule) else child
    return module

"""The callback for Hugging Face Trainer: `Trainer(..., callbacks=[MemTraceCallback()])`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memtrace.adapters.dataset_lengths import largest_batch
from memtrace.adapters.frameworks import attached_tracer, end_run
from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.adapters.output_directory import log_directory
from memtrace.adapters.taken_off import when_taken_off
from memtrace.adapters.trackers import Summary, hand_over
from memtrace.adapters.trainer_logs import TrainerLogs
from memtrace.adapters.trainer_models import models_of, trainer_of
from memtrace.attribution.models.further import FurtherModels
from memtrace.config import TracerConfig
from memtrace.exporters.trackers.figures import Figures
from memtrace.guard import Guard, ask
from memtrace.sources.hooks import HookSet

logger = logging.getLogger("memtrace")


class MemTraceCallback(TrainerCallback):
    """Traces what Trainer trains, from `on_train_begin` to `on_train_end`.

    Metrics are served from then on, the step log goes to `<output_dir>/memtrace`, which `push_to_hub` does not upload.
    One line says where they are, and the table of the last traced step is shown at the end of training; `quiet=True`
    silences both. Where the callback is taken off in the middle of a training (`remove_callback`, `pop_callback`), it
    ends with the next forward pass. The trackers that Trainer reports to get figures of memory with each log, and the
    table at the end: `trackers=False` is without. A run that crashed leaves the callback usable: the next
    `on_train_begin` starts anew. Copies and pickles have the settings, and no run.

    Models beside the trained one, such as TRL's `ref_model`, are found among the attributes of the Trainer and of its
    callbacks: their weights have the attribute's name as component.

    Args:
        further_models: other models beside the trained one, by name: see `tracer.Tracer`. Held weakly.
        **settings: fields of `TracerConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, or a further model holds no tensors.
    """

    def __init__(self, *, further_models: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self._config = TracerConfig.from_settings(settings)
        self._further = FurtherModels(further_models)
        self._tracer: MemoryTracer | None = None
        self._logs: TrainerLogs | None = None
        self._taken_off = HookSet()
        self._figures = Figures()

    @property
    def tracer(self) -> MemoryTracer | None:
        """The tracer of the current or the last run; None before the first one."""
        return self._tracer

    def __getstate__(self) -> dict[str, Any]:
        of_the_run = {"_tracer": None, "_further": FurtherModels(), "_logs": None, "_taken_off": HookSet()}
        return {**vars(self), **of_the_run, "_figures": Figures()}

    def on_train_begin(  # type: ignore[override]  # Trainer passes model and optimizer by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Attaches a tracer. What cannot be traced of the model and the optimizer is logged.

        Raises:
            ConfigError: a file that a setting names cannot be used.
            OutputError: the port, the address or the log directory cannot be used.
        """
        guard = Guard(lambda: None, strict=self._config.strict)
        guard.set_up(lambda: self._begin(args, model, optimizer), undo=lambda: None)
        if self._tracer is not None:
            self._tracer.guarded(self._expect, kwargs.get("train_dataloader"), args.train_batch_size)
            trainer = trainer_of(self)
            self._tracer.guarded(self._find_logs, args, trainer)
            self._tracer.guarded(self._follow, trainer, model)

    def _begin(self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._end_before(args)
        config = self._config if self._config.run_name else self._config.with_run_name(_run_name(args))
        output_dir = Path(args.output_dir or ".")
        writes = config.log_dir is None and (config.step_log or config.oom_reports)
        log_dir = log_directory(output_dir) if writes else output_dir
        further = self._further.also(models_of(trainer_of(self)))
        self._tracer = attached_tracer(model, [optimizer], config, log_dir, further)

    def _end_before(self, args: TrainingArguments) -> None:
        """Ends the run before, which may have had no `on_train_end`."""
        self._leave_logs()
        before, self._tracer = self._tracer, None
        if before is not None:
            if args.auto_find_batch_size:
                before.report_restart()
            before.give_way()

    def _expect(self, loader: object, batch_size: int) -> None:
        """Tells the tracer the largest micro batch that the dataset has, where that costs nothing to know."""
        batch = ask(largest_batch, getattr(loader, "dataset", None), batch_size)
        if batch is not None and self._tracer is not None:
            self._tracer.expect_batch(batch)

    def _find_logs(self, args: TrainingArguments, trainer: Trainer | None) -> None:
        """Gives the reporting integrations figures with each log, unless the settings say otherwise."""
        if not self._config.trackers or self._tracer is None:
            return
        if trainer is None:
            names = [name for name in args.report_to or () if name != "none"]
            if names:
                logger.warning("memtrace: no figures go to %s: no Trainer was found", ", ".join(names))
            return
        self._logs = TrainerLogs(trainer, self._take_figures, self._summarise)
        self._figures = Figures()
        self._tracer.add_listener(self._figures.note)

    def _take_figures(self) -> Mapping[str, float]:
        tracer = self._tracer
        if tracer is None or not tracer.attached:  # the script has detached it: there is nothing new to say
            return {}
        return tracer.guarded(lambda: self._figures.take(tracer.snapshot())) or {}

    def _summarise(self, takers: list[Callable[[Summary], None]]) -> None:
        if self._tracer is not None:
            self._tracer.guarded(hand_over, self._tracer, takers)

    def _follow(self, trainer: Trainer | None, model: nn.Module) -> None:
        """Ends the run where the callback is taken off before the training ends."""
        if trainer is not None:
            self._taken_off = when_taken_off(trainer, self, model, self._end)

    def _end(self) -> None:
        """Ends the run with its training, or where the callback is taken off before that."""
        self._leave_logs()
        if self._tracer is not None:
            end_run(self._tracer, self._config)

    def _leave_logs(self) -> None:
        self._taken_off.close()
        logs, self._logs = self._logs, None
        if logs is not None:
            ask(logs.leave)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a step."""
        if self._tracer is not None:
            if self._logs is not None:
                self._tracer.guarded(self._logs.enter)
            self._tracer.begin_step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the step, after gradients were set to zero."""
        if self._tracer is not None:
            self._tracer.end_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches, and shows the table on the first process of each machine."""
        self._end()


def _run_name(args: TrainingArguments) -> str | None:
    """Returns the name that the user gave the run; None where Trainer has filled in the output directory's path."""
    name = getattr(args, "run_name", None)
    return name if name and name != args.output_dir else Path(args.output_dir or ".").resolve().name or None

"""The callback that every Hugging Face Trainer of a process has under `memtrace run`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from memtrace.adapters.hf_trainer import MemTraceCallback
from memtrace.adapters.trainer_models import trainer_of
from memtrace.errors import MemTraceError
from memtrace.launch.loaded import LAUNCHED

logger = logging.getLogger("memtrace")


class RunCallback(MemTraceCallback):
    """A `MemTraceCallback` with the settings of the environment, which nobody has asked for in code.

    Where the script gives its Trainer one of its own, that one traces, and this one does nothing. What cannot be used
    of its outputs costs the tracing and a warning, not the training.
    """

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
        """Attaches a tracer, unless the script does so itself."""
        LAUNCHED.leave([optimizer])
        if LAUNCHED.guard.run(self._has_other) is not False:
            self._end_before(args)
            return
        try:
            super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        except MemTraceError as error:
            logger.warning("memtrace: this run is not traced, training goes on: %s", error)

    def _has_other(self) -> bool:
        trainer = trainer_of(self)
        callbacks = () if trainer is None else trainer.callback_handler.callbacks
        return any(isinstance(one, MemTraceCallback) and not isinstance(one, RunCallback) for one in callbacks)

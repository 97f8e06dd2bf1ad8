"""The callback that every Trainer of Lightning has under `memtrace run`."""

from __future__ import annotations

import logging
from typing import Any

from memtrace.adapters.lightning import MemTraceLightningCallback
from memtrace.errors import MemTraceError
from memtrace.launch.loaded import LAUNCHED

logger = logging.getLogger("memtrace")


class RunLightningCallback(MemTraceLightningCallback):
    """A `MemTraceLightningCallback` with the settings of the environment, which nobody has asked for in code.

    Where the script gives its Trainer one of its own, that one traces, and this one does nothing. What cannot be used
    of its outputs costs the tracing and a warning, not the training.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches a tracer, unless the script does so itself."""
        LAUNCHED.leave(trainer.optimizers)
        others = [one for one in trainer.callbacks if isinstance(one, MemTraceLightningCallback)]
        if any(not isinstance(one, RunLightningCallback) for one in others):
            self._end_before()
            return
        try:
            super().on_train_start(trainer, pl_module)
        except MemTraceError as error:
            logger.warning("memtrace: this run is not traced, training goes on: %s", error)

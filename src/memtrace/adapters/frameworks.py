"""What the callbacks of training frameworks share: a tracer of whatever the framework hands over."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.adapters.said import say_where, show_table
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.optimizers.finding import HandedOver
from memtrace.config import TracerConfig
from memtrace.errors import ConfigError

logger = logging.getLogger("memtrace")


def attached_tracer(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer | None],
    config: TracerConfig,
    log_dir: Path,
    further: FurtherModels,
) -> MemoryTracer | None:
    """Returns an attached tracer; None where the model cannot be traced, which is logged.

    The user did not write what a framework hands over: an optimizer that cannot be followed costs a warning and the
    figures of its state, a model without memory (all of it on the meta device) a warning and the tracing.

    Args:
        model: the module that is trained.
        optimizers: what the framework steps, wrapped or not.
        config: the settings.
        log_dir: where the step log goes when the settings do not say.
        further: the models beside the trained one.

    Raises:
        ConfigError: a file that a setting names cannot be used.
        OutputError: the port, the address or the log directory cannot be used.
    """
    given = HandedOver(optimizer for optimizer in optimizers if optimizer is not None)
    try:
        tracer = MemoryTracer(
            model,
            given,
            replace(config, quiet=True),  # a framework's run ends where its callback says so, which shows the table
            default_log_dir=log_dir,
            explicit_steps=True,
            further_models=further,
        )
    except ConfigError as error:
        logger.warning("memtrace: this run is not traced, training goes on: %s", error)
        return None
    tracer.attach()
    if not config.quiet and tracer.identity.local_rank == 0:
        say_where(tracer.url, tracer.log_path)
    return tracer


def end_run(tracer: MemoryTracer, config: TracerConfig) -> None:
    """Detaches the tracer of a run that has come to its end, and shows the table on the first process of each machine.

    Args:
        tracer: what `attached_tracer` has returned.
        config: the settings that it was given.
    """
    tracer.detach()
    if not config.quiet and tracer.identity.local_rank == 0:
        tracer.guarded(show_table, tracer.snapshot())

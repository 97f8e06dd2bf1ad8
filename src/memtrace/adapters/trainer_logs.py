"""Figures of memory in the logs that a Trainer's reporting integrations read, and in nobody else's."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
)

from memtrace.adapters.trackers import Summary, to_mlflow, to_tensorboard, to_trackio, to_wandb
from memtrace.guard import ask

_INTEGRATIONS = tuple(set(INTEGRATION_TO_CALLBACK.values()))
_TRACKIO: Any = INTEGRATION_TO_CALLBACK.get("trackio", ())
"""Its class; of no callback where this transformers does not know it."""


class TrainerLogs:
    """Two places around each group of reporting integrations in a Trainer's list of callbacks.

    Trainer hands one dictionary of logs from callback to callback, and the integrations come before those of the user.
    At the first place figures are put into it, at the second they are taken out: whoever else reads the logs (the
    progress bar, a user's callback, `log_history`, the metrics that choose the best model) finds them as they were.

    The life of the places is that of a training: from `enter()`, with its first step, when callbacks that others add at
    its begin are there and told of it, to `leave()`, which leaves the list as it was. A training that an exception ends
    leaves them until the next one begins, with the callback that they ask. Copies and pickles of a place are callbacks
    that do nothing.

    Args:
        trainer: whose logs they are. Held weakly.
        figures: returns the figures for one log; empty where there are none.
        summarise: is called when training has ended, before an integration closes its run, with what hands a summary
            to each tracker that has a place for it. On the first process of the job only, which has the trackers.
    """

    def __init__(
        self,
        trainer: Trainer,
        figures: Callable[[], Mapping[str, float]],
        summarise: Callable[[list[Callable[[Summary], None]]], None],
    ) -> None:
        self._handler = weakref.ref(trainer.callback_handler)
        self._figures = figures
        self._summarise = summarise
        self._is_in = self._is_over = False
        self._step: int | None = None
        self._taken: Mapping[str, float] = {}
        self._put: tuple[str, ...] = ()
        """Keys that are in the logs now because they were put there."""

    def enter(self) -> None:
        """Puts the places into the list, where there is an integration at all; a second call does nothing."""
        handler = self._handler()
        if handler is None or self._is_in:
            return
        self._is_in = True
        around: list[TrainerCallback] = []
        for is_reporting, group in groupby(handler.callbacks, lambda callback: isinstance(callback, _INTEGRATIONS)):
            around += [_Put(self)] if is_reporting else []
            around += group
            around += [_TakeOut(self)] if is_reporting else []
        if len(around) > len(handler.callbacks):
            handler.callbacks = around  # another list: the one that is gone through now stays as it is

    def leave(self) -> None:
        """Takes the places out of the list."""
        handler = self._handler()
        if handler is not None and any(isinstance(one, _Place) and one.logs is self for one in handler.callbacks):
            handler.callbacks = [one for one in handler.callbacks if not (isinstance(one, _Place) and one.logs is self)]

    def end(self) -> None:
        """Gives the trackers the summary of the run; a second call does nothing."""
        handler = self._handler()
        if handler is not None and not self._is_over:
            self._is_over = True
            self._summarise([taker for one in handler.callbacks for taker in ask(list, _takers(one)) or ()])

    def put(self, logs: dict[str, Any], step: int) -> None:
        """Adds the figures to the logs of a training step; the same to each group of integrations."""
        if "loss" not in logs:  # an evaluation, or the totals of the training, which its caller gets
            return
        if step != self._step:
            self._step, self._taken = step, self._figures()
        self._put = tuple(key for key in self._taken if key not in logs)
        logs.update((key, self._taken[key]) for key in self._put)

    def take_out(self, logs: dict[str, Any]) -> None:
        """Takes the figures out of the logs."""
        put, self._put = self._put, ()
        for key in put:
            logs.pop(key, None)


class _Place(TrainerCallback):
    """A place in the list."""

    def __init__(self, logs: TrainerLogs) -> None:
        self.logs = logs

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainerCallback, ()


class _Put(_Place):
    """The place before a group of integrations."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Puts the figures in."""
        ask(self.logs.put, logs, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the trackers the summary, before they close their runs."""
        if state.is_world_process_zero:
            self.logs.end()


class _TakeOut(_Place):
    """The place after a group of integrations."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes the figures out."""
        ask(self.logs.take_out, logs)


def _takers(callback: TrainerCallback) -> Iterator[Callable[[Summary], None]]:
    """Yields what hands a summary to the tracker of one integration, if it has a run now."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        yield to_tensorboard(callback.tb_writer)
    elif isinstance(callback, WandbCallback):
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            yield to_wandb(run)
    elif isinstance(callback, MLflowCallback):
        mlflow: Any = sys.modules.get("mlflow")
        run = None if mlflow is None else mlflow.active_run()
        if run is not None:
            yield to_mlflow(mlflow.MlflowClient(), run.info.run_id)
    elif isinstance(callback, _TRACKIO) and "trackio" in sys.modules:
        yield to_trackio(sys.modules["trackio"])

"""What one step may take, and what is said where steps or their parts are not seen."""

from __future__ import annotations

from torch import nn

from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.window import TraceWindow
from memtrace.record.limitations import Unseen, endless_step, no_forward, traces_given_up
from memtrace.tracing.publication import Publication
from memtrace.tracing.schedule import TraceSchedule
from memtrace.tracing.skipped_steps import ENDLESS

_STEPS_WITHOUT_FORWARD = 3
"""Steps in a row without a forward pass of the model after which memtrace says so."""
_FORWARD_PASSES, _TIMES_AS_MANY = 64, 8
"""Forward passes that a traced step may have, evaluations included: so many, or so many times as many as the largest
step before had micro batches."""


class StepBounds:
    """Bounds each step by those before it, and says once what is not seen of them.

    Args:
        published: takes in what is not seen.
        schedule: is told where nothing can be traced.
    """

    def __init__(self, published: Publication, schedule: TraceSchedule) -> None:
        self._published, self._schedule = published, schedule
        self._most = 0
        """Micro batches of the finished step that had most."""
        self._without_forward = 0
        """Steps in a row in which no forward pass was heard."""

    def look(self, step: StepInProgress | None, window: TraceWindow, *, skipped_passes: int) -> None:
        """Looks before each forward pass how many the step has had.

        A window that has outgrown what one step may take ends, and its step goes on without. A step that has had more
        than a step can have is said not to end.

        Args:
            step: the step at work; None between steps and in one that is skipped.
            window: the window, open or not.
            skipped_passes: forward passes of a step that is skipped.
        """
        passes = skipped_passes if step is None else step.micro_batches
        most = _TIMES_AS_MANY * self._most
        if passes > max(ENDLESS, most):
            self._published.limit(endless_step(passes))
        if step is not None and window.is_open and window.outgrown(max(_FORWARD_PASSES, most)):
            step.recorded = False
            window.abandon()
            step.lost = True

    def ended(self, step: StepInProgress, model: nn.Module) -> None:
        """Notes a finished step."""
        self._most = max(self._most, step.micro_batches)
        self._without_forward = 0 if step.micro_batches else self._without_forward + 1
        self._schedule.untraceable = self._without_forward >= _STEPS_WITHOUT_FORWARD
        if self._schedule.untraceable:
            self._published.limit(no_forward(model))
        if self._schedule.given_up or self._schedule.keeps_being_refused:
            self._published.limit(traces_given_up())
        self._published.sees(Unseen.STEP_END)
        if step.micro_batches:
            self._published.sees(Unseen.FORWARD)

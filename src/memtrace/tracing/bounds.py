"""What one step may take, and what is said where steps or their parts are not seen."""

from __future__ import annotations

from torch import nn

from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.window import TraceWindow
from memtrace.record.limitations import Unseen, endless_step, left_open, no_forward, several_threads, traces_given_up
from memtrace.tracing.publication import Publication
from memtrace.tracing.schedule import TraceSchedule
from memtrace.tracing.skipped_steps import ENDLESS

_STEPS_WITHOUT_FORWARD = 3
"""Steps in a row without a forward pass of the model after which memtrace says so."""
_FORWARD_PASSES, _TIMES_AS_MANY = 64, 8
"""Forward passes that a traced step may have, evaluations included: so many, or so many times as many as the largest
step before had micro batches."""
_OTHER_STEPS = 16
"""Steps of another optimizer, without a forward pass of the model between them, after which a traced step was left."""
_SECONDS, _TIMES_AS_LONG = 600.0, 8
"""How long a step may be traced: so long, or so many times as long as the longest step before."""


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
        self._longest_seconds = 0.0
        """The finished step that took longest."""
        self._other_steps = _OTHER_STEPS
        self._was_left = False
        """Whether the step at work was taken for one that was left."""

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
        self.look_at_window(step, window)
        if window.is_open and window.outgrown(max(_FORWARD_PASSES, most)):
            _end(step, window)

    def look_at_window(self, step: StepInProgress | None, window: TraceWindow) -> None:
        """Looks how long the window has been open, and how often optimizers have stepped that memtrace was not given.

        Where that is more than a step has, the step was left and something else is at work: the window ends. So it does
        where it has not all of the step, because a part of that runs on a thread that is not recorded.

        Args:
            step: see `look`.
            window: see `look`.
        """
        if not window.is_open:
            return
        if not window.is_whole:
            _end(step, window)
            self._published.limit(several_threads())
            return
        seconds, others = window.seconds, window.other_steps
        if others >= self._other_steps or seconds > max(_SECONDS, _TIMES_AS_LONG * self._longest_seconds):
            self._was_left = True
            _end(step, window)
            self._published.limit(left_open(others, seconds))

    def ended(self, step: StepInProgress, model: nn.Module, seconds: float) -> None:
        """Notes a finished step.

        Args:
            step: the step.
            model: the watched model.
            seconds: how long the step took.
        """
        self._longest_seconds = max(self._longest_seconds, seconds)
        if self._was_left:  # or not: perhaps each step has as many of others
            self._was_left, self._other_steps = False, 2 * self._other_steps
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


def _end(step: StepInProgress | None, window: TraceWindow) -> None:
    """Ends the window, and lets its step go on without."""
    if step is not None:
        step.recorded = False
    window.abandon()
    if step is not None:
        step.lost = True

"""The step at work, whether it is followed or skipped."""

from __future__ import annotations

from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.tracing.skipped_steps import SkippedSteps


class CurrentStep:
    """The step at work: one that is followed, or one that is being skipped.

    Args:
        passed: knows of the latter.
    """

    def __init__(self, passed: SkippedSteps) -> None:
        self.skipped = passed
        self.step: StepInProgress | None = None
        """The step that is followed; None between steps, and in those that are skipped."""

    def with_marks(self) -> StepInProgress | None:
        """Returns the step that is followed."""
        return self.step

    def any(self) -> StepInProgress | None:
        """Returns the step at work, with as much as is known of it."""
        return self.step or self.skipped.in_progress()

"""Whether a step is traced, once it has begun: what the schedule wants, as far as there is room for its events."""

from __future__ import annotations

import torch

from memtrace.attribution.inputs import count_tokens
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.window import TraceWindow
from memtrace.record.limitations import too_large
from memtrace.sources.events import EventSource
from memtrace.tracing.publication import Publication
from memtrace.tracing.schedule import TraceSchedule


class TraceChoice:
    """Makes each step a traced one or a counted one, and opens the window of the former.

    Args:
        scan: knows whether there is optimizer state.
        schedule: decides which steps are traced.
        published: takes in that a step is too large.
        window: is opened for a traced step.
        source: knows for how many events there is room.
    """

    def __init__(
        self, scan: Scan, schedule: TraceSchedule, published: Publication, window: TraceWindow, source: EventSource
    ) -> None:
        self._scan = scan
        self._schedule = schedule
        self._published = published
        self._window = window
        self._source = source
        self._allocations: int | None = None
        """Allocations of the last step with a record, by the counters; None where there are none."""
        self._micro_batches = 0
        """Its micro batches."""

    def make(self, step: StepInProgress, batch: torch.Tensor | None) -> None:
        """Makes the step a traced one or a counted one, once its first batch is known.

        One that allocates more often than the source has room for is traced from its last micro batch on, as far as the
        step before tells which that is.
        """
        tokens = 0 if batch is None else count_tokens(batch)
        wanted = self._schedule.wants(step.number, has_state=self._scan.has_state, tokens=tokens)
        if not wanted or self._window.is_open:
            step.recorded = wanted
            return
        allocations, micro_batches = self._allocations, max(1, self._micro_batches)
        if allocations is not None and not self._source.fits(allocations):
            allocations = -(-allocations // micro_batches)
            if not self._source.fits(allocations):
                self._published.limit(too_large(allocations))
                self._schedule.refused(step.number)
                step.recorded = False
                return
            if step.micro_batches + 1 < micro_batches:
                return  # not yet
            step.traced_from = micro_batches
        step.recorded = self._window.open(allocations)
        if not step.recorded:
            self._schedule.refused(step.number)

    def ended(self, step: StepInProgress) -> None:
        """Notes a finished step: the next one will be about as large."""
        self._micro_batches = step.micro_batches
        self._allocations = step.allocations() or self._allocations

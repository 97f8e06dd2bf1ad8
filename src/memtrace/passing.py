"""Steps that are passed over: counted, and nothing else, where steps are so short that records would take too much."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memtrace.attribution.scan import Scan
from memtrace.guard import Guard


class PassedSteps:
    """The steps until the next record.

    A step that is passed over reads no counter and makes no record: two calls around its forward pass and two around
    its optimizer, of some microseconds together.

    Args:
        scan: knows when all optimizers have stepped.
        guard: knows what memtrace has taken so far.
        count: called for each step that was passed over.
    """

    def __init__(self, scan: Scan, guard: Guard, count: Callable[[], None]) -> None:
        self._scan, self._guard, self._count = scan, guard, count
        self._left = 0
        self._stepped: dict[int, int] = {}
        self._begin_ns = 0
        self.number: int | None = None
        """Number of the step that is being passed over; None between steps."""
        self.seconds = 0.0
        """What memtrace took for the steps that were passed over last."""

    @property
    def on(self) -> bool:
        """Whether the next step, or the one at work, is passed over."""
        return self._left > 0

    def plan(self, steps: int) -> None:
        """Passes over so many steps from now on."""
        self._left, self._begin_ns, self.seconds = steps, self._guard.spent_ns, 0.0

    def hasten(self) -> None:
        """Passes over no step after the one at work."""
        if self.number is None:
            self.stop()
        else:
            self._left = 1

    def stop(self) -> int | None:
        """Passes over no more, also not what is left of the step at work; returns its number."""
        number = self.number
        if self._left:
            self._left = 0
            self._finish()
        return number

    def optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes that an optimizer has stepped, which may end the step."""
        self._stepped[id(optimizer)] = self._stepped.get(id(optimizer), 0) + 1
        if self._scan.finished(self._stepped):
            self.step_ends()

    def step_ends(self) -> None:
        """Counts a step."""
        self._count()
        self._left -= 1
        self.number = None
        self._stepped.clear()
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        self.number = None
        self._stepped.clear()
        self.seconds = (self._guard.spent_ns - self._begin_ns) / 1e9

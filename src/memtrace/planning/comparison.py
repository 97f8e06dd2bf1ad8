"""A plan held against a measured step, category by category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memtrace.errors import PlanError
from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One category, or a total, planned and measured; bytes."""

    category: Category | None
    """None for the total."""
    planned: int
    measured: int

    @property
    def nbytes(self) -> int:
        """Measured minus planned: above 0 where the plan was too low."""
        return self.measured - self.planned

    @property
    def ratio(self) -> float | None:
        """The difference as a share of what was measured; None where nothing was."""
        return self.nbytes / self.measured if self.measured else None


def compare(plan: Plan, record: StepRecord) -> Mapping[Moment, list[Difference]]:
    """Returns the differences at each moment that both know, the total last.

    Raises:
        PlanError: they have no moment in common.
    """
    common = [moment for moment in Moment if moment in plan.moments and moment in record.moments]
    if not common:
        raise PlanError(
            f"step {record.step} knows no moment of the plan's ({', '.join(plan.moments)}): compare with a traced "
            f"step, got one that knows {', '.join(record.moments) or 'none'}"
        )
    return {moment: _differences(plan.moments[moment], record.moments[moment]) for moment in common}


def _differences(planned: Breakdown, measured: Breakdown) -> list[Difference]:
    sizes = planned.by_category(), measured.by_category()
    rows = [
        Difference(category=category, planned=sizes[0].get(category, 0), measured=sizes[1].get(category, 0))
        for category in Category
        if any(category in known for known in sizes)
    ]
    return [*rows, Difference(category=None, planned=planned.total_bytes, measured=measured.total_bytes)]

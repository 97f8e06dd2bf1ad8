"""The figures that go to trackers: their keys, what each says, and their values since they were last taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from memtrace.record import glossary
from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import PERSISTENT, Category, Moment
from memtrace.record.snapshot import Snapshot
from memtrace.record.units import GIB

SHOWN_SHARE = 0.01
"""Share of the peak from which a category has a figure; from then on it has one in every log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: the words for it, not its values."""

    key: str
    """As the dictionary has it; its end is the unit. A tracker may put the name of a group before it."""
    help: str
    absent: str
    """When there is none; empty where there always is one."""


_SINCE = "the steps with a record since the log before"

PEAK = Figure(
    key="memtrace/peak_gib",
    help=f"Most memory allocated at once within a step: the highest of {_SINCE}.",
    absent="where no peak is known: on a CPU that is so in every step that is not traced",
)
PART = Figure(
    key="memtrace/peak/<category>_gib",
    help=f"What that peak is made of: each category that has taken {SHOWN_SHARE:.0%} of a peak so far, and "
    "`unattributed`. Where the step was traced they add up to the peak, but for categories below that share.",
    absent="as the peak; where the step was not traced, also what only a trace can see",
)
HEADROOM = Figure(
    key="memtrace/headroom_gib",
    help="What the run can still allocate at the end of the last step: free memory of the device plus allocator slack, "
    "within the limits of the run; below 0 when it is over one.",
    absent="where free memory is not known",
)
FORECAST = Figure(
    key="memtrace/forecast_peak_gib",
    help=glossary.FORECAST_PEAK.meaning,
    absent="until the peak of a batch can be forecast",
)
RISK = Figure(
    key="memtrace/oom_risk_ratio",
    help=glossary.RISK.meaning,
    absent="where the capacity or the forecast peak is not known",
)

CATALOGUE = (PEAK, PART, HEADROOM, FORECAST, RISK)
"""All figures, in the order of the page."""


def part_key(category: Category) -> str:
    """Returns the key of a category at the peak."""
    return PART.key.replace("<category>", category.value)


class Figures:
    """The figures of a run since they were last taken.

    One object is for one reader: what one takes, another does not miss. Belongs to the training thread.
    """

    def __init__(self) -> None:
        self._highest: StepRecord | None = None
        self._was_taken = False
        self._shown = {Category.UNATTRIBUTED}

    def note(self, record: StepRecord) -> None:
        """Takes in a step: a listener of the tracer."""
        if self._was_taken:
            self._highest, self._was_taken = None, False
        if _peak_bytes(record) is not None and (_peak_bytes(self._highest) or 0) <= (_peak_bytes(record) or 0):
            self._highest = record

    def take(self, snapshot: Snapshot) -> dict[str, float]:
        """Returns the figures by key, in GiB (2**30 bytes) or as the key says; what is not known has none.

        The next call begins anew; where no step with a record has ended between two calls, they return the same.
        """
        self._was_taken = True
        found: dict[str, float] = {}
        if self._highest is not None:
            peak = self._highest.moments[Moment.PEAK]
            found[PEAK.key] = peak.held_bytes / GIB
            found.update(self._parts(peak))
        # As of the end of the last step, like all else here and in the step log: not of the moment of this call.
        headroom = replace(snapshot, device_memory=None).headroom_bytes
        if headroom is not None:
            found[HEADROOM.key] = headroom / GIB
        if snapshot.risk is not None and snapshot.risk.peak is not None:
            found[FORECAST.key] = snapshot.risk.peak.predicted_bytes / GIB
        if snapshot.risk is not None and snapshot.risk.oom_risk_ratio is not None:
            found[RISK.key] = float(snapshot.risk.oom_risk_ratio)
        return found

    def _parts(self, peak: Breakdown) -> Iterator[tuple[str, float]]:
        sizes: Mapping[Category, int] = peak.by_category()
        self._shown |= {category for category, size in sizes.items() if size >= SHOWN_SHARE * peak.held_bytes}
        for category in Category:
            size = sizes.get(category, 0)
            if category in self._shown and (size or category in PERSISTENT or not peak.estimated):
                yield part_key(category), size / GIB


def _peak_bytes(record: StepRecord | None) -> int | None:
    peak = None if record is None else record.moments.get(Moment.PEAK)
    return None if peak is None else peak.held_bytes

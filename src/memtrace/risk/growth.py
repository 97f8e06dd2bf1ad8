"""The forecast of growth: memory that outlives every step and becomes more with each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from memtrace.categories import Category

WINDOW = 64
"""Steps with known persistent memory that are looked at. Slower growth is left to the alert rules, which see hours."""
MIN_STEPS = 8
"""Fewer do not make a trend."""
STILL_GROWING = 0.5
"""The newer half of the window must grow at least this share as fast as the older half: caches fill and stop."""
MIN_SHARE = 0.001
"""Growth over the window that is worth a word, as a share of the level: every step leaves a few scalars behind."""
BORNE_OUT = 0.5
"""Share of what steps left behind by which the process must have grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What outlived one step."""

    step: int
    unix_seconds: float
    by_category: Mapping[Category, int]
    process_bytes: int | None = None
    """What the process held, where the categories alone cannot tell whether what was left behind is still there."""

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.by_category.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A trend that was found."""

    category: Category
    """What grew most over the window."""
    bytes_per_step: float
    seconds_per_step: float


class GrowthTrend:
    """Keeps the newest levels and says whether they are a leak."""

    def __init__(self) -> None:
        self._levels: deque[Level] = deque(maxlen=WINDOW)

    def add(self, level: Level) -> None:
        """Takes in the level after one more step. Where the steps are counted anew, the trend begins anew."""
        if self._levels and level.step <= self._levels[-1].step:
            self._levels.clear()
        self._levels.append(level)

    def growth(self) -> Growth | None:
        """Returns the growth of the window; None where it has none, has ceased, or goes up and down."""
        if len(self._levels) < MIN_STEPS:
            return None
        first, last = self._levels[0], self._levels[-1]
        grown_bytes = last.total - first.total
        if grown_bytes <= 0 or grown_bytes < MIN_SHARE * first.total:  # nearly every step of every run ends here
            return None
        levels = tuple(self._levels)
        half = len(levels) // 2
        if not _climbs([level.total for level in levels]):
            return None
        if _slope(levels[half:]) < STILL_GROWING * _slope(levels[:half]) or not _borne_out(levels):
            return None
        grown = {c: last.by_category.get(c, 0) - first.by_category.get(c, 0) for c in Category}
        steps = last.step - first.step
        return Growth(
            category=max(grown, key=grown.__getitem__),
            bytes_per_step=_slope(levels),
            seconds_per_step=(last.unix_seconds - first.unix_seconds) / steps,
        )


def _climbs(totals: Sequence[int]) -> bool:
    """Whether each quarter of the window lies above the one before it, and never falls back to where it began."""
    quarters = [totals[len(totals) * i // 4 : len(totals) * (i + 1) // 4] for i in range(4)]
    lowest = [min(quarter) for quarter in quarters]
    return all(a < b for a, b in pairwise(lowest)) and lowest[-1] > max(quarters[0])


def _borne_out(levels: Sequence[Level]) -> bool:
    """Whether the process grew with the levels, where it was looked at: by the lowest of each half of the window.

    Steps leave tensors behind that the next step replaces, such as the last logits; those do not add up.
    """
    held = [level.process_bytes for level in levels if level.process_bytes is not None]
    if len(held) < len(levels):
        return True
    half = len(levels) // 2
    grown = min(held[half:]) - min(held[:half])
    return grown >= BORNE_OUT * (levels[half].total - levels[0].total)


def _slope(levels: Sequence[Level]) -> float:
    """Returns the median growth in bytes per step between levels half a window apart (Theil-Sen, thinned)."""
    half = len(levels) // 2
    return median(
        (later.total - earlier.total) / (later.step - earlier.step)
        for earlier, later in zip(levels[:half], levels[len(levels) - half :], strict=True)
    )

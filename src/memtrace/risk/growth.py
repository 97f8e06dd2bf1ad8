"""The forecast of growth: persistent memory that becomes more with each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from memtrace.record.categories import Category

WINDOW = 64
"""Steps with known persistent memory that are looked at. Slower growth is left to the alert rules, which see hours."""
MIN_STEPS = 8
"""Fewer do not make a trend."""
STILL_GROWING = 0.5
"""The newer half of the window must grow at least this share as fast as the older half: caches fill and stop."""
MIN_SHARE = 0.001
"""Growth over so many steps that is worth a word, as a share of the level: every step leaves a few scalars behind."""
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
    """Keeps levels and says whether they are a leak.

    They are the newest ones. Where the process has to bear them out, another choice is spread over all steps so far:
    the process is read once in many short steps, and grows by whole pages.
    """

    def __init__(self) -> None:
        self._levels: deque[Level] = deque(maxlen=WINDOW)
        self._spread: list[Level] = []
        self._apart = 1
        """Steps that lie between two of the spread levels at least."""

    def add(self, level: Level) -> None:
        """Takes in the level after one more step. Where the steps are counted anew, the trend begins anew."""
        if self._levels and level.step <= self._levels[-1].step:
            self._levels.clear()
            self._spread, self._apart = [], 1
        self._levels.append(level)
        if level.process_bytes is None or (self._spread and level.step - self._spread[-1].step < self._apart):
            return
        if len(self._spread) == WINDOW:
            self._apart = 2 * max(self._apart, (level.step - self._spread[0].step) // WINDOW)
            self._spread = self._spread[::2]
        self._spread.append(level)

    def growth(self) -> Growth | None:
        """Returns the growth; None where there is none, where it has ceased, or where levels go up and down."""
        return _growth(self._levels) or _growth(self._spread)


def _growth(known: Sequence[Level]) -> Growth | None:
    if len(known) < MIN_STEPS:
        return None
    first, last = known[0], known[-1]
    grown_bytes, steps = last.total - first.total, last.step - first.step
    if grown_bytes <= 0 or grown_bytes < MIN_SHARE * first.total * max(1.0, steps / WINDOW):  # nearly always
        return None
    levels = tuple(known)
    half = len(levels) // 2
    if not _climbs([level.total for level in levels]):
        return None
    if _slope(levels[half:]) < STILL_GROWING * _slope(levels[:half]) or not _borne_out(levels):
        return None
    grown = {c: last.by_category.get(c, 0) - first.by_category.get(c, 0) for c in Category}
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
    """Whether the process grew with the levels, where it was looked at, and still does so at the end of the window.

    Told by the lowest of each half of the window, and of the two quarters of the newer half. Steps leave tensors behind
    that the next step replaces, such as the last logits; those do not add up. The first steps of a process make it grow
    anyhow.
    """
    held = [level.process_bytes for level in levels if level.process_bytes is not None]
    if len(held) < len(levels):
        return True
    half, newest = len(levels) // 2, len(levels) * 3 // 4
    return all(
        min(held[middle:end]) - min(held[start:middle]) >= BORNE_OUT * (levels[middle].total - levels[start].total)
        for start, middle, end in ((0, half, len(levels)), (half, newest, len(levels)))
    )


def _slope(levels: Sequence[Level]) -> float:
    """Returns the median growth in bytes per step between levels half a window apart (Theil-Sen, thinned)."""
    half = len(levels) // 2
    return median(
        (later.total - earlier.total) / (later.step - earlier.step)
        for earlier, later in zip(levels[:half], levels[len(levels) - half :], strict=True)
    )

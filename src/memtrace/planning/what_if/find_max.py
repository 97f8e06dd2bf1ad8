"""The largest batch or the longest sequence that fits, by simulating as few steps as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from memtrace.errors import PlanError

_Found = TypeVar("_Found")

LIMIT = 2**24
"""Where a search gives up: no batch has more samples, and no text more tokens."""


def find_max(
    attempt: Callable[[int], _Found], fits: Callable[[_Found], bool], *, step: int = 1, limit: int = LIMIT
) -> tuple[int, _Found]:
    """Returns the largest multiple of `step` up to `limit` that fits, and what came of it.

    Doubles until it does not fit any more, then halves what is left: some 2 log2(n) attempts. What fits is taken to
    fit with less, too.

    Args:
        attempt: returns what comes of a number.
        fits: says whether that will do.
        step: distance between two numbers that may be tried.
        limit: the largest number that may be tried.

    Raises:
        PlanError: not even the smallest number fits.
    """
    most = max(limit // step, 1)
    best = attempt(step)
    if not fits(best):
        raise PlanError(f"not even {step} fits")
    low, high = 1, most + 1
    while low < most and high == most + 1:
        tried = min(2 * low, most)
        found = attempt(tried * step)
        if fits(found):
            low, best = tried, found
        else:
            high = tried
    while high - low > 1:
        tried = (low + high) // 2
        found = attempt(tried * step)
        if fits(found):
            low, best = tried, found
        else:
            high = tried
    return low * step, best

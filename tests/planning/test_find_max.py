"""The search for the largest number that fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrace.errors import PlanError
from memtrace.planning.what_if.find_max import find_max


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 10_000))
def test_it_finds_the_largest_multiple_that_fits(room: int, step: int, limit: int) -> None:
    """For any room, step and limit; with few attempts, and none beyond the limit."""
    tried: list[int] = []

    def attempt(number: int) -> int:
        tried.append(number)
        return number

    if step > room:
        with pytest.raises(PlanError, match=f"not even {step} fits"):
            find_max(attempt, lambda number: number <= room, step=step, limit=limit)
        return
    found, result = find_max(attempt, lambda number: number <= room, step=step, limit=limit)
    assert found == result == max(step, min(room, limit) // step * step)
    assert max(tried) <= max(step, limit)
    assert len(tried) == len(set(tried)) <= 30

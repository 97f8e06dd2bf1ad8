"""The search itself: over peaks that are numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrace.gate.versions.bisection import Jump, Stretch, find_jump, most_trials


def search(peaks: list[int | None]) -> tuple[Jump | None, list[int]]:
    """Returns what is found among versions that are called by their numbers, and which were tried."""
    tried: list[int] = []

    def peak_of(version: str) -> int | None:
        tried.append(int(version))
        return peaks[int(version)]

    return find_jump([str(index) for index in range(len(peaks))], peak_of), tried


@given(st.integers(2, 200).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count - 1))))
def test_the_only_jump_is_found_in_few_trials(drawn: tuple[int, int]) -> None:
    """Wherever it is: each version is tried once, and their number grows with the logarithm."""
    count, place = drawn
    found, tried = search([7] * place + [9] * (count - place))
    assert found == Jump(before=str(place - 1), after=str(place), nbytes=2, skipped=(), elsewhere=())
    assert len(tried) == len(set(tried)) <= most_trials(count)


@given(st.lists(st.none() | st.integers(0, 4), min_size=2, max_size=30))
def test_whatever_the_history_what_is_found_is_a_jump(peaks: list[int | None]) -> None:
    """Its ends have the peaks that it says, all between them cannot be planned, and the differences add up."""
    peaks = [peaks[0] or 0, *peaks[1:-1], peaks[-1] or 0]
    found, tried = search(peaks)
    assert len(tried) == len(set(tried))
    if found is None:
        assert peaks[0] == peaks[-1]
        return
    before, after = int(found.before), int(found.after)
    assert found.nbytes == (peaks[after] or 0) - (peaks[before] or 0) != 0
    assert [*map(int, found.skipped)] == [*range(before + 1, after)]
    assert all(peaks[index] is None for index in range(before + 1, after))
    assert found.nbytes + sum(one.nbytes for one in found.elsewhere) == (peaks[-1] or 0) - (peaks[0] or 0)


def test_the_larger_one_of_two_jumps_is_found_and_the_other_one_named() -> None:
    found, _ = search([10, 11, 11, 11, 11, 40, 40, 40])
    assert found == Jump(
        before="4", after="5", nbytes=29, skipped=(), elsewhere=(Stretch(first="0", last="3", nbytes=1),)
    )


def test_up_and_down_again_is_no_change_between_the_ends() -> None:
    assert search([10, 90, 10])[0] is None


def test_what_cannot_be_planned_is_skipped() -> None:
    """The nearest one to the middle is tried in its place; between the two that are found, all may have made it."""
    found, tried = search([5, 5, None, None, 8, 8, 8])
    assert found == Jump(before="1", after="4", nbytes=3, skipped=("2", "3"), elsewhere=())
    assert tried[:4] == [0, 6, 3, 2]


@pytest.mark.parametrize("peaks", [[1], [None, 1], [1, None]])
def test_a_search_needs_two_ends(peaks: list[int | None]) -> None:
    with pytest.raises(ValueError):
        search(peaks)

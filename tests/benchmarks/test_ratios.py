"""Ratios of step times, from blocks whose times are given."""

from __future__ import annotations

import pytest

from benchmarks.ratios import Block, compare


def block(*seconds: float, traced: tuple[int, ...] = (), around: float = 0.0) -> Block:
    flags = tuple(position in traced for position in range(len(seconds)))
    return Block(seconds=seconds, traced=flags, around_seconds=around)


def test_a_run_is_the_median_of_each_kind_of_step_by_its_share() -> None:
    """Seven steps of 1.01 and one traced one of 1.5: (7 x 1.01 + 1.5) / 8."""
    nothing = {number: block(1.0, 1.0) for number in range(4)}
    found = compare({**{n: block(1.01, 1.01) for n in range(3)}, 3: block(1.01, 1.5, traced=(1,))}, nothing)
    assert (found.untraced, found.traced) == (pytest.approx(1.01), pytest.approx(1.5))
    assert found.ratio == pytest.approx((7 * 1.01 + 1.5) / 8) == pytest.approx(found.total)
    assert (found.rounds, found.steps, found.traced_steps) == (4, 8, 1)
    assert found.interval[0] <= found.ratio <= found.interval[1]


def test_a_block_is_held_against_nothing_of_its_own_round() -> None:
    """A machine that becomes twice as slow changes no ratio, and rounds without the variant do not count."""
    nothing = {0: block(1.0), 1: block(9.0), 2: block(2.0)}
    found = compare({0: block(1.2), 2: block(2.4)}, nothing)
    assert (found.ratio, *found.quartiles) == pytest.approx((1.2, 1.2, 1.2))


def test_starting_and_stopping_a_tool_is_counted() -> None:
    """Around a block of four steps."""
    assert compare({0: block(*[1.0] * 4, around=2.0)}, {0: block(*[1.0] * 4)}).ratio == pytest.approx(1.5)

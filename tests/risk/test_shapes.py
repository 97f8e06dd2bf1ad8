"""Bytes as a function of the shape of a batch."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtrace.risk.shapes import ShapePoint, estimate


def points(samples: int, positions: range, linear: float, quadratic: float, floor: int = 0) -> list[ShapePoint]:
    found = []
    for length in positions:
        tokens = samples * length
        nbytes = max(floor, round(linear * tokens + quadratic * tokens * length))
        found.append(ShapePoint(tokens=tokens, positions=length, nbytes=nbytes))
    return found


@given(linear=st.floats(100, 1e6), target=st.integers(70, 500))
@example(linear=401923.5, target=70)  # rounded to whole bytes these points fit a curve better, by millionths of a byte
def test_line_is_extrapolated(linear: float, target: int) -> None:
    """Bytes in proportion to tokens stay so, without a quadratic term, several times beyond what was seen."""
    forecast = estimate(points(2, range(20, 60, 3), linear, 0), 2 * target, target)
    assert forecast.nbytes == pytest.approx(linear * 2 * target, rel=1e-3)
    assert not forecast.quadratic


@pytest.mark.parametrize("seed", [100, 202, 315, 722, 959])
def test_rounded_blocks_do_not_bend_the_line(seed: int) -> None:
    """A curve follows blocks that an allocator has rounded up to 512 bytes better by chance: it is not believed."""
    chance = random.Random(seed)
    rates = [chance.uniform(1, 20_000) for _ in range(chance.randint(5, 300))]

    def point(length: int) -> ShapePoint:
        nbytes = sum(math.ceil(rate * 2 * length / 512) * 512 for rate in rates)
        return ShapePoint(tokens=2 * length, positions=length, nbytes=nbytes)

    forecast = estimate([point(length) for length in chance.sample(range(20, 200), 16)], 1000, 500)
    assert not forecast.quadratic
    assert forecast.nbytes == pytest.approx(point(500).nbytes, rel=1e-3)


def test_stored_attention_scores_are_found() -> None:
    """Bytes with the square of the length are extrapolated with the square of the length."""
    forecast = estimate(points(2, range(20, 60, 3), 1000, 50), 400, 200)
    assert forecast.quadratic
    assert forecast.nbytes == pytest.approx(1000 * 400 + 50 * 400 * 200, rel=1e-3)


def test_quadratic_term_follows_the_length_and_not_the_tokens() -> None:
    """The same tokens in twice as many, shorter samples take less where scores are stored."""
    seen = points(2, range(20, 60, 3), 1000, 50) + points(4, range(20, 60, 3), 1000, 50)
    assert estimate(seen, 800, 100).nbytes < estimate(seen, 800, 200).nbytes


def test_floor_of_small_batches_does_not_bend_the_line() -> None:
    """Peaks that lie elsewhere in the step for small batches are left out of the line for large ones."""
    forecast = estimate(points(2, range(10, 60, 2), 1000, 0, floor=45_000), 400, 200)
    assert forecast.nbytes == pytest.approx(400_000, rel=0.02)


def test_one_size_is_extrapolated_in_proportion_with_a_wide_band() -> None:
    """With nothing but one shape to go by, the bytes grow with the tokens and the band says how little is known."""
    forecast = estimate([ShapePoint(tokens=100, positions=50, nbytes=1000)], 200, 100)
    assert forecast.nbytes == 2000
    assert forecast.band == pytest.approx(300)


def test_what_was_seen_needs_no_band() -> None:
    """At the one shape that was seen, with one and the same peak, nothing is extrapolated."""
    forecast = estimate([ShapePoint(tokens=100, positions=50, nbytes=1000)], 100, 50)
    assert (forecast.nbytes, forecast.band) == (1000, 0)


def test_band_of_a_far_target_admits_a_curve() -> None:
    """Few points of nearly one size that could be a line or a curve: the band reaches from one to the other."""
    seen = points(2, range(40, 46), 1000, 5)
    truth = 1000 * 800 + 5 * 800 * 400
    forecast = estimate(seen, 800, 400)
    assert abs(forecast.nbytes - truth) <= forecast.band


def test_peaks_that_fall_with_size_make_no_line() -> None:
    """A slope below zero is not believed: the bytes of the seen batches are scaled up."""
    seen = [ShapePoint(tokens=t, positions=t, nbytes=1000 - t) for t in (100, 200, 300)]
    assert estimate(seen, 600, 600).nbytes == 800 * 600 / 300

"""Weighted least squares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrace.risk.regression import fit, student_t


@given(
    intercept=st.floats(-1e9, 1e9),
    slope=st.floats(0.1, 1e6),
    tokens=st.lists(st.integers(1, 10**6), min_size=3, max_size=40, unique=True),
)
def test_exact_line_is_found(intercept: float, slope: float, tokens: list[int]) -> None:
    """Points on a line give that line, whatever their scale."""
    rows = [(1.0, float(t)) for t in tokens]
    values = [intercept + slope * t for t in tokens]
    result = fit(rows, values, [1.0] * len(rows))
    assert result is not None
    scale = max(abs(value) for value in values) + abs(intercept) + slope * max(tokens)
    assert result.predict((1.0, 2.0 * max(tokens))) == pytest.approx(
        intercept + slope * 2 * max(tokens), abs=1e-6 * scale
    )


def test_outlier_does_not_bend_the_line() -> None:
    """One point far above the others moves the prediction by less than a hundredth of its distance."""
    rows = [(1.0, float(t)) for t in range(1, 21)]
    values = [100.0 + 10 * t + (t % 3 - 1) for t in range(1, 21)]
    straight = fit(rows, values, [1.0] * 20)
    values[10] += 1000
    bent = fit(rows, values, [1.0] * 20)
    assert straight is not None
    assert bent is not None
    assert abs(bent.predict((1.0, 30.0)) - straight.predict((1.0, 30.0))) < 10


def test_points_of_one_size_determine_no_line() -> None:
    """A singular problem has no answer, instead of a wild one."""
    assert fit([(1.0, 5.0)] * 4, [1.0, 2.0, 3.0, 4.0], [1.0] * 4) is None


def test_fewer_points_than_coefficients_have_no_fit() -> None:
    """Two points do not make a parabola."""
    assert fit([(1.0, 1.0, 1.0), (1.0, 2.0, 4.0)], [1.0, 2.0], [1.0, 1.0]) is None


def test_band_widens_with_noise_and_distance() -> None:
    """The interval holds for a new point: more noise and a farther point make it wider."""
    rows = [(1.0, float(t)) for t in range(1, 11)]
    little = fit(rows, [10.0 * t + (-1) ** t for t in range(1, 11)], [1.0] * 10)
    much = fit(rows, [10.0 * t + 5 * (-1) ** t for t in range(1, 11)], [1.0] * 10)
    assert little is not None
    assert much is not None
    assert little.half_width((1.0, 10.0)) < little.half_width((1.0, 40.0))
    assert little.half_width((1.0, 10.0)) < much.half_width((1.0, 10.0))


def test_quantile_is_never_too_small_between_table_entries() -> None:
    """7 degrees of freedom use the entry for 6, which is wider."""
    assert student_t(7) == student_t(6) > student_t(8)
    assert student_t(1000) == student_t(30)

"""Weighted least squares with few features, in plain Python: some tens of points, two or three coefficients.

Neither numpy (which torch installs only where it is asked to) nor torch (which would wake its thread pool and
allocate) is worth loading for this on the training thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

Row = Sequence[float]
"""The features of one point; the constant 1 is one of them."""

_STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2)."""
_HUBER = 1.345
"""Residuals beyond so many standard deviations lose weight: 95 % efficient on normal errors (Huber 1981)."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Coefficients of a linear model, and what is needed to tell how far to trust them."""

    coefficients: tuple[float, ...]
    variance: float
    """Of the residuals, per unit of weight."""
    inverse: tuple[tuple[float, ...], ...]
    """Inverse of the weighted normal matrix."""
    freedom: int
    """Points minus coefficients."""

    def predict(self, row: Row) -> float:
        """Returns the value of the model at these features."""
        return sum(c * x for c, x in zip(self.coefficients, row, strict=True))

    def half_width(self, row: Row, weight: float = 1.0) -> float:
        """Returns half the width of the 95 % prediction interval for one new point of this weight."""
        leverage = sum(
            x * sum(m * y for m, y in zip(line, row, strict=True)) for x, line in zip(row, self.inverse, strict=True)
        )
        return student_t(self.freedom) * sqrt(self.variance * (1 / weight + max(leverage, 0.0)))


def student_t(freedom: int) -> float:
    """Returns the two-sided 95 % quantile for these degrees of freedom, rounded up between those of the table."""
    return _STUDENT_T[max(known for known in _STUDENT_T if known <= max(freedom, 1))]


def fit(rows: Sequence[Row], values: Sequence[float], weights: Sequence[float]) -> Fit | None:
    """Fits `values` to `rows` by least squares that outliers cannot bend (Huber weights, three rounds).

    Returns:
        The fit; None where the features do not determine the coefficients (too few different points).
    """
    current = list(weights)
    result = _solve(rows, values, current)
    for _ in range(_ROUNDS):
        if result is None:
            return None
        residuals = [value - result.predict(row) for row, value in zip(rows, values, strict=True)]
        scale = _spread([r * sqrt(w) for r, w in zip(residuals, weights, strict=True)])
        if scale == 0:
            return result
        current = [
            w * min(1.0, _HUBER * scale / (abs(r) * sqrt(w))) if r else w
            for r, w in zip(residuals, weights, strict=True)
        ]
        result = _solve(rows, values, current)
    return result


def _spread(residuals: Sequence[float]) -> float:
    """Returns the median absolute deviation as an estimate of the standard deviation of normal errors."""
    ordered = sorted(abs(r) for r in residuals)
    return 1.4826 * ordered[len(ordered) // 2]


def _solve(rows: Sequence[Row], values: Sequence[float], weights: Sequence[float]) -> Fit | None:
    size = len(rows[0]) if rows else 0
    if len(rows) < size or not size:
        return None
    scales = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]
    scaled = [[x / s for x, s in zip(row, scales, strict=True)] for row in rows]
    normal = [
        [sum(w * row[i] * row[j] for w, row in zip(weights, scaled, strict=True)) for j in range(size)]
        for i in range(size)
    ]
    right = [sum(w * row[i] * v for w, row, v in zip(weights, scaled, values, strict=True)) for i in range(size)]
    inverse = _invert(normal)
    if inverse is None:
        return None
    scaled_coefficients = [sum(m * r for m, r in zip(line, right, strict=True)) for line in inverse]
    coefficients = tuple(c / s for c, s in zip(scaled_coefficients, scales, strict=True))
    freedom = len(rows) - size
    squares = sum(
        w * (v - sum(c * x for c, x in zip(scaled_coefficients, row, strict=True))) ** 2
        for w, row, v in zip(weights, scaled, values, strict=True)
    )
    return Fit(
        coefficients=coefficients,
        variance=squares / freedom if freedom else 0.0,
        inverse=tuple(tuple(m / (scales[i] * scales[j]) for j, m in enumerate(line)) for i, line in enumerate(inverse)),
        freedom=freedom,
    )


def _invert(matrix: list[list[float]]) -> list[list[float]] | None:
    """Returns the inverse by Gauss-Jordan elimination with pivoting; None for a matrix that is singular in practice."""
    size = len(matrix)
    work = [[*line, *(float(i == j) for j in range(size))] for i, line in enumerate(matrix)]
    smallest = 1e-12 * max(abs(x) for line in matrix for x in line)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(work[i][column]))
        if abs(work[pivot][column]) <= smallest:
            return None
        work[column], work[pivot] = work[pivot], work[column]
        factor = work[column][column]
        work[column] = [x / factor for x in work[column]]
        for i in range(size):
            if i != column and work[i][column]:
                lead = work[i][column]
                work[i] = [x - lead * y for x, y in zip(work[i], work[column], strict=True)]
    return [line[size:] for line in work]

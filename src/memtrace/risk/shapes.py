"""Bytes as a function of the shape of a batch: linear in tokens, with a quadratic term where the points show one.

What a step allocates for its batch is the largest of several curves, because the peak of a short batch lies elsewhere
in the step than that of a long one. So points count for more the larger their batch, a model may do without the
smaller half of them, and the model is chosen that would have forecast the largest batches from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from memtrace.risk.regression import Fit, Row, fit

HELD_OUT_SHARE = 0.3
"""Share of the points, those with most tokens, that a model must forecast from the others."""
SIMPLER_UNLESS = 0.5
"""A less simple model is used where its worst error is below this share of the simpler one's."""
ROUNDING_SHARE = 2e-4
"""Sizes are rounded, to whole bytes and by an allocator to whole blocks. A model whose worst error is below this share
of what a batch took is exact: a less simple one could only follow the rounding."""
PLAUSIBLE = 3.0
"""Models whose worst error is within this multiple of the chosen one's are plausible too, the more of them the farther
the target lies: the band reaches to all of them, and to those that too few points were there to judge."""
SINGLE_SIZE_BAND_RATIO = 0.3
"""Band of an extrapolation from shapes that are all of one size, as a share of what is extrapolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePoint:
    """What a micro batch of one shape took."""

    tokens: int
    """Samples x positions."""
    positions: int
    """Positions of each sample; 1 where samples have none."""
    nbytes: int

    @property
    def pairs(self) -> int:
        """Pairs of positions, summed over the samples: what stored attention scores follow."""
        return self.tokens * self.positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a micro batch will take."""

    nbytes: float
    band: float
    """Half width of the 95 % band in bytes, as far as the points can tell."""
    quadratic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Which features a model has and which points it is made from."""

    quadratic: bool
    upper_half: bool

    def row(self, point: ShapePoint) -> Row:
        return (1.0, point.tokens, point.pairs) if self.quadratic else (1.0, point.tokens)

    def fitted(self, points: Sequence[ShapePoint]) -> _Model | None:
        """Returns the model of these points, by size; None where they do not determine one that grows with it."""
        used = points[len(points) // 2 :] if self.upper_half else points
        if len({point.tokens for point in used}) < 2 + self.quadratic:
            return None
        largest = used[-1].tokens
        result = fit(
            [self.row(point) for point in used],
            [point.nbytes for point in used],
            [_weight(point, largest) for point in used],
        )
        if result is None or min(result.coefficients[1:]) < 0:
            return None
        return _Model(form=self, fit=result, largest=largest)


_FORMS = tuple(_Form(quadratic=q, upper_half=u) for q in (False, True) for u in (False, True))
"""The simplest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    form: _Form
    fit: Fit
    largest: int
    """Tokens of the largest point it was fitted to."""

    def predict(self, point: ShapePoint) -> float:
        return self.fit.predict(self.form.row(point))

    def half_width(self, point: ShapePoint) -> float:
        return self.fit.half_width(self.form.row(point), _weight(point, self.largest))


def estimate(points: Sequence[ShapePoint], tokens: int, positions: int) -> Estimate:
    """Returns what a micro batch of this shape will take, from points of other shapes (at least one)."""
    target = ShapePoint(tokens=tokens, positions=positions, nbytes=0)
    by_size = sorted(points, key=lambda point: (point.tokens, point.positions))
    models = [model for form in _FORMS if (model := form.fitted(by_size)) is not None]
    judged = [(model, error) for model in models if (error := _forecast_wrongly(by_size, model.form)) is not None]
    if not judged:
        return _barely_known(models[0], by_size, target) if models else _proportional(by_size, target)
    chosen, worst = judged[0]
    for model, error in judged[1:]:
        if worst > ROUNDING_SHARE and error < SIMPLER_UNLESS * worst:
            chosen, worst = model, error
    nbytes = chosen.predict(target)
    stretch = _stretch(by_size, target)
    excluded = [model for model, error in judged if error > PLAUSIBLE * stretch * worst]
    others = [abs(model.predict(target) - nbytes) for model in models if model not in excluded]
    return Estimate(
        nbytes=nbytes,
        band=min(nbytes, max(chosen.half_width(target), worst * nbytes * stretch, *others)),
        quadratic=chosen.form.quadratic,
    )


def _weight(point: ShapePoint, largest: int) -> float:
    return (point.tokens / largest) ** 2


def _held_out(points: Sequence[ShapePoint]) -> int:
    return max(1, round(HELD_OUT_SHARE * len(points)))


def _forecast_wrongly(points: Sequence[ShapePoint], form: _Form) -> float | None:
    """Returns the worst error on the largest points of a model made without them, as a share of what they took.

    None where too few points are left to make one.
    """
    count = _held_out(points)
    model = form.fitted(points[:-count]) if len(points) > count else None
    if model is None or model.fit.freedom < 1:
        return None
    return max(abs(model.predict(point) - point.nbytes) / max(point.nbytes, 1) for point in points[-count:])


def _stretch(points: Sequence[ShapePoint], target: ShapePoint) -> float:
    """Returns how much farther the target lies from the points than those held out did from the others; at least 1."""
    seen, known = points[-1].tokens, points[-_held_out(points) - 1].tokens
    return max(1.0, (target.tokens - seen) / max(seen - known, 1))


def _barely_known(line: _Model, points: Sequence[ShapePoint], target: ShapePoint) -> Estimate:
    """A line through too few points to judge it: the band is that of an extrapolation from one size."""
    nbytes = line.predict(target)
    beyond = abs(nbytes - points[-1].nbytes)
    return Estimate(nbytes=nbytes, band=max(line.half_width(target), SINGLE_SIZE_BAND_RATIO * beyond))


def _proportional(points: Sequence[ShapePoint], target: ShapePoint) -> Estimate:
    """All points are of one size, or do not grow with it: what they took is taken to grow with the tokens."""
    typical, most = median(point.nbytes for point in points), max(point.nbytes for point in points)
    nbytes = max(typical * target.tokens / max(points[-1].tokens, 1), 0.0)
    return Estimate(nbytes=nbytes, band=max(SINGLE_SIZE_BAND_RATIO * abs(nbytes - typical), most - typical))

"""Bytes by category over steps or over time, stacked, as SVG: a picture that needs no script, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from memtrace.record.categories import COLOURS, Category
from memtrace.record.units import GIB, MIB

WIDTH, HEIGHT = 760, 236
MAX_POINTS = 320
"""Points of a picture: of more, those are left out beside which more is allocated."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 64, 752, 10, 206, 13
_TICKS = 4
_NEAR = 0.02
"""Marks that are less than this share of the width apart have one line and one label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Areas:
    """What a picture shows."""

    x: Sequence[float]
    """Where each point is, ascending; at least one."""
    by_category: Mapping[Category, Sequence[int]]
    """Bytes at each point, in the order of `Category`."""
    x_title: str
    holds: bool = False
    """Whether the sizes of a point hold until the next one, as an allocator's do; else a line joins them."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Positions that have a line and a name."""


def svg(areas: Areas) -> str:
    """Returns the picture, with a legend below it; empty where nothing was allocated."""
    kept = _kept(areas)
    x = [areas.x[at] for at in kept]
    rows = {category: [sizes[at] for at in kept] for category, sizes in areas.by_category.items() if any(sizes)}
    highest = max((sum(column) for column in zip(*rows.values(), strict=True)), default=0)
    if not highest:
        return ""
    plane = _Plane(first=x[0], last=x[-1], highest=highest)
    marks = _together(plane, areas.marks)
    above = _ROW * len(marks)
    parts = [*_scale(plane), *_bands(plane, x, rows, holds=areas.holds), *_marks(marks)]
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 14, areas.x_title, "middle"))
    legend = "".join(
        f'<span style="margin-right:14px;white-space:nowrap"><span style="color:{COLOURS[category]}">&#9632;</span> '
        f"{escape(category.value)}</span>"
        for category in rows
    )
    return (
        f'<svg viewBox="0 {-above} {WIDTH} {HEIGHT + above}" width="{WIDTH}" style="max-width:100%;height:auto" '
        f'role="img" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
        f'<div style="font:12px sans-serif;max-width:{WIDTH}px">{legend}</div>'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """From positions and bytes to the picture's own units."""

    first: float
    last: float
    highest: int

    def x(self, position: float) -> float:
        span = self.last - self.first
        return _LEFT + ((position - self.first) / span if span > 0 else 0.5) * (_RIGHT - _LEFT)

    def y(self, nbytes: float) -> float:
        return _BOTTOM - nbytes / self.highest * (_BOTTOM - _TOP)


def _kept(areas: Areas) -> list[int]:
    """Returns the points that are drawn: of each stretch of equal length the highest, and the first and the last."""
    count = len(areas.x)
    if count <= MAX_POINTS:
        return list(range(count))
    totals = [sum(column) for column in zip(*areas.by_category.values(), strict=True)] or [0] * count
    stretch = -(-count // MAX_POINTS)
    highest = {max(range(at, min(at + stretch, count)), key=totals.__getitem__) for at in range(0, count, stretch)}
    return sorted(highest | {0, count - 1})


def _scale(plane: _Plane) -> Iterator[str]:
    unit, factor = ("GiB", GIB) if plane.highest >= GIB else ("MiB", MIB)
    for tick in range(_TICKS + 1):
        size = plane.highest * tick / _TICKS
        height = plane.y(size)
        yield f'<path d="M{_LEFT} {height:.1f}H{_RIGHT}" stroke="currentColor" stroke-opacity="0.15"/>'
        yield _text(_LEFT - 6, height + 4, f"{size / factor:,.3g}{f' {unit}' if tick == _TICKS else ''}", "end")
    yield _text(_LEFT, _BOTTOM + 14, _number(plane.first), "start")
    if plane.last > plane.first:
        yield _text(_RIGHT, _BOTTOM + 14, _number(plane.last), "end")


def _bands(plane: _Plane, x: Sequence[float], rows: Mapping[Category, Sequence[int]], *, holds: bool) -> Iterator[str]:
    base = [0] * len(x)
    for category, sizes in rows.items():
        top = [below + size for below, size in zip(base, sizes, strict=True)]
        edge = [*_edge(plane, x, top, holds=holds), *reversed(list(_edge(plane, x, base, holds=holds)))]
        points = " ".join(f"{left:.1f},{height:.1f}" for left, height in edge)
        yield f'<polygon points="{points}" fill="{COLOURS[category]}"><title>{escape(category.value)}</title></polygon>'
        base = top


def _edge(plane: _Plane, x: Sequence[float], sizes: Sequence[int], *, holds: bool) -> Iterator[tuple[float, float]]:
    if len(x) == 1:  # one step: a bar over the whole width
        yield from ((_LEFT, plane.y(sizes[0])), (_RIGHT, plane.y(sizes[0])))
        return
    for at, (position, size) in enumerate(zip(x, sizes, strict=True)):
        if holds and at:
            yield plane.x(position), plane.y(sizes[at - 1])
        yield plane.x(position), plane.y(size)


def _together(plane: _Plane, marks: Mapping[str, float]) -> Mapping[float, list[str]]:
    """Returns the names by where they are; those too near each other to be told apart share a place."""
    groups: dict[float, list[str]] = {}
    for name, position in sorted(marks.items(), key=lambda mark: mark[1]):
        left = plane.x(position)
        near = next((known for known in groups if left - known <= _NEAR * (_RIGHT - _LEFT)), None)
        groups.setdefault(left if near is None else near, []).append(name)
    return groups


def _marks(groups: Mapping[float, list[str]]) -> Iterator[str]:
    """Yields a line for each place, with its names in a row of their own above the picture.

    Names go towards the middle, and no line is crossed: those further out have the higher rows.
    """
    middle = (_LEFT + _RIGHT) / 2
    outer_first = [*(left for left in groups if left <= middle), *reversed([left for left in groups if left > middle])]
    for row, left in enumerate(outer_first):
        height = _TOP - _ROW * (len(groups) - row)
        yield f'<path d="M{left:.1f} {height}V{_BOTTOM}" stroke="currentColor" stroke-dasharray="3 3"/>'
        anchor, aside = ("start", 4) if left <= middle else ("end", -4)
        yield _text(left + aside, height + 9, ", ".join(groups[left]), anchor)


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(words)}</text>'

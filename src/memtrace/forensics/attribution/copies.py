"""How many copies of a model outlive steps, and of which width: what fits the sizes of the blocks best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from memtrace.forensics.attribution.expected import ExpectedModel

WIDTHS = (4, 2, 1)
"""Bytes of an element."""
_MOST = {4: 6, 2: 5, 1: 2}
_MISFIT = 0.5
"""Share of the bytes in blocks of such sizes that may not fit. Above it, this is no model of that kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copies of all parameters that blocks show, by bytes of an element."""

    by_width: Mapping[int, int]

    def __getitem__(self, width: int) -> int:
        return self.by_width.get(width, 0)

    @property
    def total(self) -> int:
        """Copies of any width."""
        return sum(self.by_width.values())


def count_copies(model: ExpectedModel, counts: Mapping[int, int]) -> Copies:
    """Returns the copies that explain most; none where the sizes are not those of the model.

    A size can be that of one parameter in four bytes and of another in two: all widths are fitted together.

    Args:
        model: the sizes of its parameters.
        counts: how many blocks of each size outlive steps.
    """
    expected = {width: {size * width: count for size, count in model.parameters.items()} for width in WIDTHS}
    sizes = {size for by_size in expected.values() for size in by_size}
    there = {size: counts.get(size, 0) for size in sizes}
    held = sum(size * count for size, count in there.items())
    if not held:
        return Copies(by_width={})
    chosen: tuple[int, ...] = (0, 0, 0)
    least = held
    for tried in product(*(range(_MOST[width] + 1) for width in WIDTHS)):
        misfit = 0
        for size in sizes:
            predicted = sum(
                copies * expected[width].get(size, 0) for copies, width in zip(tried, WIDTHS, strict=True) if copies
            )
            misfit += size * abs(there[size] - predicted)
            if misfit >= least:
                break
        else:
            chosen, least = tried, misfit
    fits = least <= _MISFIT * held
    return Copies(by_width=dict(zip(WIDTHS, chosen, strict=True)) if fits else {})

"""How many copies of a model outlive steps, and of which width: what fits the sizes of the blocks best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from memtrace.forensics.attribution.expected import ExpectedModel

WIDTHS = (4, 2, 1)
"""Bytes of an element. A copy of one byte is a state of an 8-bit optimizer, which has scales: see `parts_of`."""
_MIN_8BIT, _SCALED = 4096, 256
"""Elements from which a parameter has 8-bit states, and those that share a float32 scale. Source: bitsandbytes,
optim/optimizer.py, `min_8bit_size` and `blocksize`; torchao's optimizers have the same."""
_MOST = {4: 6, 2: 5, 1: 2}
_MISFIT = 0.5
"""Share of the bytes in blocks of such sizes that may not fit. Above it, this is no model of that kind."""


class Part(NamedTuple):
    """A block that one parameter has in a copy of the model."""

    nbytes: int
    width: int
    """Bytes of an element."""
    scales: bool = False
    """Whether it holds the scales of 8-bit elements."""


def parts_of(elements: int, width: int) -> Sequence[Part]:
    """Returns the blocks of one parameter in a copy: one, and in an 8-bit copy one with a scale for each 256 elements.

    Small parameters have float32 states in an 8-bit copy.
    """
    if width != 1:
        return (Part(elements * width, width),)
    if elements < _MIN_8BIT:
        return (Part(elements * 4, 4),)
    return Part(elements, 1), Part(-(-elements // _SCALED) * 4, 4, scales=True)


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
    expected: dict[int, Counter[int]] = {width: Counter() for width in WIDTHS}
    for width, by_size in expected.items():
        for elements, count in model.parameters.items():
            for part in parts_of(elements, width):
                by_size[part.nbytes] += count
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
                copies * expected[width][size] for copies, width in zip(tried, WIDTHS, strict=True) if copies
            )
            misfit += size * abs(there[size] - predicted)
            if misfit >= least:
                break
        else:
            chosen, least = tried, misfit
    fits = least <= _MISFIT * held
    return Copies(by_width=dict(zip(WIDTHS, chosen, strict=True)) if fits else {})

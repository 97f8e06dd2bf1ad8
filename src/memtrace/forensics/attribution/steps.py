"""Where steps begin and end, from the pattern of what is allocated: each step is a hump between two valleys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_TURNS = 0.3
"""Share of the height of the highest hump by which a curve must rise or fall again for a valley or a top to count."""
_AT_THE_END = 0.04
"""Share of the changes since the valley before within which a low is the end of the history."""
_ALIKE = 0.1
"""Share of that height within which what is allocated at two boundaries is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Positions of a history between which steps lie; ascending."""

    boundaries: Sequence[int]
    """Before the first step, between steps, and after the last one that has ended."""
    tops: Sequence[int]
    """The highest position of each step, one fewer than boundaries, or as many where the last step has not ended."""
    valleys: Sequence[int]
    """Every low from which the curve rises again: boundaries, and those between the micro batches of a step."""
    whole: int
    """How many steps have ended: boundaries at which as much is allocated as at the last one."""

    def of(self, position: int) -> int | None:
        """Returns the number of the step that a position is in; None before the first one."""
        found = bisect_right(self.boundaries, position) - 1
        return found if found >= 0 else None


def find_valleys(totals: Sequence[int]) -> list[int]:
    """Returns where a history begins, and the lows from which its curve rises again or ends; none without a hump.

    Args:
        totals: what was allocated at each position.
    """
    height = height_of(totals)
    return _valleys(totals, _TURNS * height) if height > 0 else []


def height_of(totals: Sequence[int]) -> int:
    """Returns how far the curve rises above its floor, which the first step may raise by the optimizer's state."""
    return max(totals) - min(totals[len(totals) // 2 :])


def steps_between(totals: Sequence[int], valleys: Sequence[int], boundaries: Sequence[int]) -> Steps:
    """Returns the steps between those valleys that are boundaries."""
    ends = [*boundaries[1:], len(totals) - 1][: len(boundaries)]
    near = _ALIKE * height_of(totals)
    return Steps(
        boundaries=boundaries,
        tops=[
            max(range(begin, end + 1), key=totals.__getitem__)
            for begin, end in zip(boundaries, ends, strict=True)
            if end > begin
        ],
        valleys=valleys,
        whole=sum(abs(totals[boundary] - totals[boundaries[-1]]) <= near for boundary in boundaries[1:]),
    )


def _valleys(totals: Sequence[int], turns: float) -> list[int]:
    """Returns the beginning, and the last position of each low from which the curve rises again or ends.

    A low just before the end may come before the last gradients of the step, which stay: then the end is meant.
    """
    valleys = [0]
    rising, extreme = True, 0
    for position, total in enumerate(totals):
        if rising:
            if total > totals[extreme]:
                extreme = position
            elif total < totals[extreme] - turns:
                rising, extreme = False, position
        elif total <= totals[extreme]:
            extreme = position
        elif total > totals[extreme] + turns:
            valleys.append(extreme)
            rising, extreme = True, position
    if not rising:
        end = len(totals) - 1
        valleys.append(end if end - extreme <= _AT_THE_END * (extreme - valleys[-1]) else extreme)
    return valleys

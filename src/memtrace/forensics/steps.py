"""Where steps begin and end, from the pattern of what is allocated: each step is a hump between two valleys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_TURNS = 0.3
"""Share of the height of the highest hump by which a curve must rise or fall again for a valley or a top to count."""
LEVEL = 0.1
"""Share of that height within which a valley is as low as others: between steps, not between micro batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Positions of a history between which steps lie; ascending."""

    boundaries: Sequence[int]
    """Before the first step, where least is allocated between steps, and after the last one that has ended."""
    tops: Sequence[int]
    """The highest position of each step, one fewer than boundaries, or as many where the last step has not ended."""
    valleys: Sequence[int]
    """Boundaries, and where least is allocated between the micro batches of a step."""

    def of(self, position: int) -> int | None:
        """Returns the number of the step that a position is in; None before the first one."""
        found = bisect_right(self.boundaries, position) - 1
        return found if found >= 0 else None


def find_steps(totals: Sequence[int]) -> Steps:
    """Returns the steps of a history; none where its curve has no hump.

    Args:
        totals: what was allocated at each position.
    """
    floor = min(totals[len(totals) // 2 :])  # the first step may grow it, by the optimizer's state
    height = max(totals) - floor
    if height <= 0:
        return Steps(boundaries=(), tops=(), valleys=())
    valleys = _valleys(totals, _TURNS * height)
    level = _level(totals, valleys)
    return between(totals, valleys, [v for v in valleys[1:] if abs(totals[v] - level) <= LEVEL * height])


def between(totals: Sequence[int], valleys: Sequence[int], chosen: Sequence[int]) -> Steps:
    """Returns the steps between the first valley and the chosen ones."""
    boundaries = [valleys[0], *chosen]
    ends = [*chosen, len(totals) - 1]
    return Steps(
        boundaries=boundaries,
        tops=[
            max(range(begin, end + 1), key=totals.__getitem__)
            for begin, end in zip(boundaries, ends, strict=True)
            if end > begin
        ],
        valleys=valleys,
    )


def _level(totals: Sequence[int], valleys: Sequence[int]) -> int:
    """Returns what is allocated between steps: the least of late valleys, but for an end that lets go of everything."""
    late = [totals[valley] for valley in valleys[1:] if valley >= len(totals) // 2]
    before_the_end = min(late[:-1], default=0)
    if len(late) > 1 and late[-1] < before_the_end / 2:
        return before_the_end
    return min(late, default=totals[valleys[-1]])


def _valleys(totals: Sequence[int], turns: float) -> list[int]:
    """Returns the beginning, and the last position of each low from which the curve rises again or ends."""
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
        valleys.append(extreme)
    return valleys

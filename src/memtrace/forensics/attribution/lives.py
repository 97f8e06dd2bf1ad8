"""How blocks live over steps: those that outlive them, and those that each step makes and frees."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter

from memtrace.attribution.timeline import Lifetime
from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.attribution.steps import Steps, find_valleys, height_of, steps_between
from memtrace.forensics.history import History
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source

_ALIKE = 0.1
"""Share of the height of a step within which two valleys are alike."""
_MOSTLY = 0.8
_NEAR = 0.1
"""Share of a step within which a valley and the end of a step are one."""
_FEW = 3
"""Valleys of a history in which there can be none between steps: its ends, and one in a step."""
_UPDATE = 0.35
"""Changes of an optimizer's step are fewer than this share of those of the passes before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """The blocks of a history, by how long they live. Indices of lifetimes, in the order of birth."""

    steps: Steps
    persistent: Sequence[int]
    """Those that outlive steps."""
    of_steps: Sequence[Sequence[int]]
    """Those that are made in each step and are no persistent ones; the last step may not have ended."""

    @property
    def steps_seen(self) -> bool:
        """Whether the history shows a whole step."""
        return self.steps.whole > 0


def read_lives(history: History, ends: Sequence[int] = ()) -> Lives:
    """Returns how the blocks of a history live.

    Args:
        history: of a device.
        ends: positions at which steps ended, where somebody knows; else they are found in the curve.
    """
    lifetimes = history.timeline.lifetimes
    totals = history.timeline.totals
    valleys = find_valleys(totals)
    if ends:
        bounds = [*({0} | {*ends})]
        bounds.sort()
        valleys = _with_ends(valleys, bounds)
    else:
        found = _boundaries(lifetimes, valleys, height_of(totals)) if valleys else []
        bounds = [*_after_updates(lifetimes, found, valleys, history.end)]
        moved = dict(zip(found, bounds, strict=True))
        valleys = sorted({moved.get(valley, valley) for valley in valleys})
    steps = steps_between(totals, valleys, bounds)
    persistent: list[int] = []
    of_steps: list[list[int]] = [[] for _ in bounds]
    for index, life in enumerate(lifetimes):
        if _outlives(life, bounds, history):
            persistent.append(index)
            continue
        number = bisect_right(bounds, max(life.begin, 0)) - 1
        if number >= 0:
            of_steps[number].append(index)
    return Lives(steps=steps, persistent=persistent, of_steps=of_steps)


def _with_ends(valleys: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Returns the valleys and the ends of steps, without the valleys that an end stands for."""
    shortest = min((after - before for before, after in pairwise(ends)), default=0)
    apart = [valley for valley in valleys if _distance(valley, ends) > _NEAR * shortest]
    return sorted({*apart, *ends})


def _distance(position: int, ends: Sequence[int]) -> int:
    """Returns how far the nearest of the ends is, which are sorted."""
    following = bisect_right(ends, position)
    return min(abs(position - end) for end in ends[max(0, following - 1) : following + 1])


def _boundaries(lifetimes: Sequence[Lifetime], valleys: Sequence[int], height: int) -> list[int]:
    """Returns the valleys that lie between steps, the first one among them.

    At a valley between micro batches, or between backward pass and optimizer, gradients are there that will be freed;
    of the valleys those are between steps at which least is there that will be. The last ones are not judged by that,
    since what they hold is not freed yet: they are none from where what is new is what was freed at others.

    Where that finds none, gradients are freed at the beginning of steps and are there at every valley. Then those
    valleys are between steps after which they are freed.
    """
    found = [*_without_updates(_chosen(lifetimes, valleys, height, beyond=0))]
    if len(valleys) > _FEW and not any(valleys[0] < valley < valleys[-1] for valley in found):
        found = [*_without_updates(_chosen(lifetimes, valleys, height, beyond=1))]
    return found


def _chosen(lifetimes: Sequence[Lifetime], valleys: Sequence[int], height: int, *, beyond: int) -> list[int]:
    """Returns the valleys at which least is there that is freed after so many valleys beyond, up to the judged ones."""
    dying = [0] * (len(valleys) + 1)
    for life in lifetimes:
        if life.end is not None:
            first, last = bisect_right(valleys, life.begin), bisect_right(valleys, life.end) - beyond
            dying[first] += life.nbytes
            dying[max(first, last)] -= life.nbytes
    dying = [*accumulate(dying[:-1])]
    inner = dying[1:-1] or dying[1:]
    limit = min(inner, default=0) + _ALIKE * height
    chosen = [valley for valley, nbytes in zip(valleys, dying, strict=True) if valley == valleys[0] or nbytes <= limit]
    among = {*chosen}
    freed = _freed_after(lifetimes, [valley for valley in valleys if valley not in among])
    staying = [life for life in lifetimes if life.end is None]
    for number in range(2, len(chosen)):
        first, last = (bisect_left(staying, chosen[at], key=attrgetter("begin")) for at in (number - 1, number))
        new = Counter(life.nbytes for life in staying[first:last])
        alike = _nbytes(new & freed)
        if alike > _ALIKE * height and alike >= _MOSTLY * (_nbytes(freed) if beyond else _nbytes(new)):
            return chosen[:number]
    return chosen


def _freed_after(lifetimes: Sequence[Lifetime], positions: Sequence[int]) -> Counter[int]:
    """Returns how many blocks of each size are there at a position and freed later, at most at one of the positions."""
    freed: Counter[int] = Counter()
    there: list[Lifetime] = []
    count = 0
    for position in positions:
        following = bisect_left(lifetimes, position, lo=count, key=attrgetter("begin"))
        there += lifetimes[count:following]
        there = [life for life in there if life.end is not None and life.end >= position]
        freed |= Counter(life.nbytes for life in there)
        count = following
    return freed


def _nbytes(sizes: Counter[int]) -> int:
    return sum(size * count for size, count in sizes.items())


def _without_updates(boundaries: Sequence[int]) -> Iterator[int]:
    """Yields the boundaries but those after which the optimizer's step alone makes a hump: it has fewer changes."""
    before = boundaries[0]
    for boundary, after in zip(boundaries, [*boundaries[1:], None], strict=True):
        if boundary != boundaries[0] and after is not None and after - boundary < _UPDATE * (boundary - before):
            continue
        yield boundary
        before = boundary


def _after_updates(
    lifetimes: Sequence[Lifetime], boundaries: Sequence[int], valleys: Sequence[int], end: int
) -> Iterator[int]:
    """Yields the boundaries, each where first least is there of what will be freed, before most of it is.

    The optimizer's first step makes its states after the lowest position, and gradients are freed after them.
    """
    deltas = [0] * (end + 2)
    for life in lifetimes:
        if life.end is not None:
            deltas[life.begin + 1] += life.nbytes
            deltas[life.end + 1] -= life.nbytes
    dying = [*accumulate(deltas)]
    for boundary in boundaries:
        following = bisect_right(valleys, boundary)
        if not boundary or following == len(valleys):
            yield boundary
            continue
        after = valleys[following]
        top = max(range(boundary, after + 1), key=dying.__getitem__)
        yield min(range(boundary, top + 1), key=dying.__getitem__)


def _outlives(life: Lifetime, bounds: Sequence[int], history: History) -> bool:
    """Whether a block is there at one boundary after its birth and still at the next, or at the end of the history.

    Gradients that are freed in the next step are there at one only. After the last boundary, half a step more must have
    gone by. Without a boundary, what is there at the end counts.
    """
    following = bisect_right(bounds, life.begin)
    if not bounds[1:]:
        return life.end is None
    if following >= len(bounds):
        return False
    if life.end is None:
        goes_on = 2 * (history.end - bounds[-1]) >= bounds[-1] - bounds[-2]
        return following < len(bounds) - 1 or len(bounds) <= 2 or goes_on
    after = bounds[following + 1] if following + 1 < len(bounds) else history.end
    return life.end > after


def labels_by_life(history: History, lives: Lives, known: Mapping[int, Label]) -> dict[int, Label]:
    """Returns what the lives of blocks tell of those that a step makes and frees.

    What is there at the end of the forward pass and is freed later was kept for the backward pass; the rest are
    temporaries.

    Args:
        history: of the device.
        lives: of its blocks.
        known: what better sources have told. Where they know gradients, the forward pass ended before the last of them.
    """
    found: dict[int, Label] = {}
    lifetimes, valleys = history.timeline.lifetimes, lives.steps.valleys
    if not valleys:
        return found
    activations = Label(Category.ACTIVATIONS, "", "", Source.LIFE)
    temporaries = Label(Category.TEMPORARIES, "", "", Source.LIFE)
    ends = [*valleys[1:], history.end]
    backward = [0] * len(valleys)
    """Where the last gradient of each micro batch was made."""
    of_steps = [index for step in lives.of_steps for index in step]
    for index in of_steps:
        number = _place(valleys, lifetimes[index].begin)
        if _is_gradient(known.get(index)):
            backward[number] = max(backward[number], lifetimes[index].begin)
    tops = [history.top(begin, gradient or end) for begin, end, gradient in zip(valleys, ends, backward, strict=True)]
    for index in of_steps:
        life = lifetimes[index]
        number = _place(valleys, life.begin)
        end = history.end if life.end is None else life.end
        if end <= ends[number]:
            found[index] = activations if life.begin < tops[number] <= end else temporaries
    return found


def _place(valleys: Sequence[int], position: int) -> int:
    return max(0, bisect_right(valleys, position) - 1)


def _is_gradient(label: Label | None) -> bool:
    return label is not None and label.category is Category.GRADIENTS

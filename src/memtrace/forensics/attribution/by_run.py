"""What blocks are for by what a memtrace run of the same process has counted: sums of categories, no single blocks.

A sum tells blocks where it leaves no choice. What a step makes and has at its end is the gradients where it has their
bytes exactly; a gradient has the size of its parameter, and so the sizes of the model are known. The record names the
copies of the model. What is left is told where it adds up to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from memtrace.attribution.timeline import Lifetime
from memtrace.forensics.attribution.copies import Part, parts_of
from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.attribution.lives import Lives
from memtrace.forensics.history import History
from memtrace.forensics.recorded_run import SeenRun, SeenStep
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.readings.snapshot_reading import Source

_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
"""Bytes of the elements of weights, masters and states that have one block for each parameter."""
_COPIES = frozenset({Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE})
_ALONE = 256 << 10
"""Bytes from which a block is an entry by its size alone: smaller ones have such a size by chance."""

Sizes = Mapping[int, int]
"""How many parameters have so many elements."""


def labels_by_run(history: History, lives: Lives, run: SeenRun, model: ExpectedModel | None) -> dict[int, Label]:
    """Returns what the sums of a run tell, by the index of the block's lifetime.

    Args:
        history: of the device.
        lives: of its blocks, with the steps of the run.
        run: of the same process.
        model: whose sizes are used where no step shows its gradients.
    """
    lifetimes = history.timeline.lifetimes
    keys: dict[int, EntryKey] = {}
    sizes: Sizes = {} if model is None else model.parameters
    persistent = set(lives.persistent)
    for step in run.steps:
        gradients = _gradients(history, step)
        keys |= gradients
        sizes = _elements(lifetimes, gradients) or sizes
    last = run.steps[-1]
    entries = {
        key: nbytes
        for key, nbytes in last.record.moments[Moment.STEP_END].entries.items()
        if key.category is not Category.GRADIENTS or key not in keys.values()
    }
    there = [index for index in history.live(last.end) if index not in keys]
    found = _copies(lifetimes, [index for index in there if index in persistent], sizes, entries)
    told = set(found.values())
    rest = {key: nbytes for key, nbytes in entries.items() if key not in told}
    found |= _rest(lifetimes, [index for index in there if index not in found], rest)
    return {
        index: Label(key.category, key.component, key.dtype, Source.RUN)
        for index, key in (keys | found).items()
        if key.category is not Category.UNATTRIBUTED
    }


def _gradients(history: History, step: SeenStep) -> dict[int, EntryKey]:
    """Returns the blocks that a step has made and has at the end of its backward pass, where they are the gradients."""
    lifetimes = history.timeline.lifetimes
    for moment in (Moment.BACKWARD_END, Moment.STEP_END):
        breakdown = step.record.moments.get(moment)
        position = _position(history, step, moment)
        if breakdown is None or position is None:
            continue
        keys = [key for key in breakdown.entries if key.category is Category.GRADIENTS]
        nbytes = breakdown[Category.GRADIENTS]
        if not nbytes:
            continue
        made = [*history.live(position, since=step.begin)]
        top = history.top(step.begin, position)
        late = [index for index in made if lifetimes[index].begin >= top]
        for chosen in (made, late):
            if sum(lifetimes[index].nbytes for index in chosen) == nbytes:
                return _by_width(lifetimes, chosen, keys)
    return {}


def _by_width(lifetimes: Sequence[Lifetime], chosen: Sequence[int], keys: Sequence[EntryKey]) -> dict[int, EntryKey]:
    """Returns gradients with their element type: of two types each parameter has one of either, the largest first."""
    if len(keys) == 1:
        return dict.fromkeys(chosen, keys[0])
    unknown = dict.fromkeys(chosen, EntryKey(Category.GRADIENTS, "", ""))
    narrow, *_, wide = sorted(keys, key=lambda key: _WIDTHS.get(key.dtype, 0))
    if len(keys) != 2 or not 0 < _WIDTHS.get(narrow.dtype, 0) < _WIDTHS.get(wide.dtype, 0):
        return unknown
    blocks: dict[int, list[int]] = {}
    for index in chosen:
        blocks.setdefault(lifetimes[index].nbytes, []).append(index)
    found: dict[int, EntryKey] = {}
    for size in sorted(blocks, reverse=True):
        others = blocks.get(size * _WIDTHS[narrow.dtype] // _WIDTHS[wide.dtype], [])
        for index in blocks[size]:
            if not others:
                return unknown
            found |= {index: wide, others.pop(0): narrow}
    return found


def _position(history: History, step: SeenStep, moment: Moment) -> int | None:
    """Returns the last position of a step at which the bytes were in use that the run has counted at a moment."""
    breakdown = step.record.moments.get(moment)
    if moment is Moment.STEP_END or breakdown is None:
        return step.end
    totals, wanted = history.timeline.totals, breakdown.allocated_bytes
    return next((at for at in range(step.end, step.begin - 1, -1) if totals[at] == wanted), None)


def _elements(lifetimes: Sequence[Lifetime], gradients: Mapping[int, EntryKey]) -> Sizes:
    """Returns the sizes of the parameters that gradients are of; none where their element type is not known."""
    chosen = next(iter(gradients.values()), None)
    width = 0 if chosen is None else _WIDTHS.get(chosen.dtype, 0)
    if not width:
        return {}
    return Counter(lifetimes[index].nbytes // width for index, key in gradients.items() if key == chosen)


def _copies(
    lifetimes: Sequence[Lifetime], there: Sequence[int], sizes: Sizes, entries: Mapping[EntryKey, int]
) -> dict[int, EntryKey]:
    """Gives the blocks of each size to the entries that are whole copies of the model, in the order of their birth."""
    places: dict[int, list[EntryKey]] = {}
    for key in entries:
        if key.category not in _COPIES or key.dtype not in _WIDTHS:
            continue
        parts = [
            (_part_of(part, key), part.nbytes, count) for size, count in sizes.items() for part in _parts(size, key)
        ]
        wanted: Counter[EntryKey] = Counter()
        for part, nbytes, count in parts:
            wanted[part] += nbytes * count
        if wanted and all(entries.get(part) == nbytes for part, nbytes in wanted.items()):
            for part, nbytes, count in parts:
                places.setdefault(nbytes, []).extend([part] * count)
    found: dict[int, EntryKey] = {}
    for index in there:
        left = places.get(lifetimes[index].nbytes)
        if left:
            found[index] = left.pop(0)
    missing = {key for left in places.values() for key in left}
    return {index: key for index, key in found.items() if key not in missing}


def _parts(elements: int, key: EntryKey) -> Sequence[Part]:
    return parts_of(elements, _WIDTHS[key.dtype])


def _part_of(part: Part, key: EntryKey) -> EntryKey:
    """Returns the entry that a block of a copy belongs to: in an 8-bit copy, scales and small states have their own."""
    if part.scales:
        return key._replace(component=key.component.replace("state", "absmax"), dtype="float32")
    return key if part.width == _WIDTHS[key.dtype] else key._replace(dtype="float32")


def _rest(lifetimes: Sequence[Lifetime], there: Sequence[int], entries: Mapping[EntryKey, int]) -> dict[int, EntryKey]:
    """Returns what is told without sizes: an entry that one block alone has; and entries in the order of birth.

    The second only where blocks and entries add up to the same.
    """
    found = dict(_alone(lifetimes, there, entries))
    told = set(found.values())
    left = [key for key in entries if key not in told]
    blocks = [index for index in there if index not in found]
    if sum(lifetimes[index].nbytes for index in blocks) != sum(entries[key] for key in left):
        return found
    while left:
        chosen = next(((key, begun) for key in left if (begun := _first(lifetimes, blocks, entries[key]))), None)
        if chosen is None:
            return found
        key, count = chosen
        found |= dict.fromkeys(blocks[:count], key)
        left.remove(key)
        del blocks[:count]
    return found


def _alone(
    lifetimes: Sequence[Lifetime], there: Sequence[int], entries: Mapping[EntryKey, int]
) -> Iterator[tuple[int, EntryKey]]:
    by_size: dict[int, list[int]] = {}
    for index in there:
        by_size.setdefault(lifetimes[index].nbytes, []).append(index)
    counted = [*entries.values()]
    for key, nbytes in entries.items():
        if nbytes >= _ALONE and counted.count(nbytes) == len(by_size.get(nbytes, ())) == 1:
            yield by_size[nbytes][0], key


def _first(lifetimes: Sequence[Lifetime], blocks: Sequence[int], nbytes: int) -> int:
    """Returns how many of the first blocks have these bytes together; 0 where none have."""
    total = 0
    for count, index in enumerate(blocks, 1):
        total += lifetimes[index].nbytes
        if total >= nbytes:
            return count if total == nbytes else 0
    return 0

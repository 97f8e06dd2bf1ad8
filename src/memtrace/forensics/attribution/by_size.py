"""What blocks are for by their sizes: those of a model that was given, and by how they live over steps.

A block that outlives steps and has the size of a parameter is a weight, a master copy or a state of the optimizer;
which of them, the number of copies and the order of their birth tell. One that a step makes and frees late is a
gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from memtrace.attribution.timeline import Lifetime
from memtrace.forensics.attribution.copies import WIDTHS, Copies, Part, count_copies, parts_of
from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.attribution.lives import Lives
from memtrace.forensics.history import History
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source
from memtrace.sources.cuda import cublas

_DTYPES = {4: "float32", 2: "16-bit", 1: "8-bit"}
"""Element types by their bytes. Two may be bfloat16 or float16: no size tells them apart."""
_ALL, _MOST = 0.99, 0.5
"""Shares of the parameters' bytes that must be there at once: of gradients all, of casts those that autocast makes."""
_PADDING = 0.001
"""Share by which a flat buffer may be larger than what lies in it."""
_FLAT = 256 << 10
"""Bytes from which a block can be a flat buffer: smaller ones have such a size by chance."""
_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Ranks that a flat buffer may be shared out over."""
_STATE_8BIT, _SCALES_8BIT = "state", "absmax"
"""What bitsandbytes names 8-bit states and their scales; numbers from 1 on follow."""
_WORKSPACES = frozenset({cublas.BEFORE_HOPPER, cublas.FROM_HOPPER})

Role = tuple[Category, str, int]
"""Category, component and bytes of an element."""


def labels_by_size(history: History, lives: Lives, model: ExpectedModel) -> dict[int, Label]:
    """Returns what the sizes tell, by the index of the block's lifetime."""
    lifetimes = history.timeline.lifetimes
    sizes = Counter(lifetimes[index].nbytes for index in lives.persistent)
    copies, flat = count_copies(model, sizes), _flat(lifetimes, lives.persistent, model)
    if not copies.total and not flat:
        return {}
    weights = 2 if copies[2] else 4 if copies[4] else 1 if copies[1] else 2
    summed = bool(flat) and copies.total > 0  # gradients have a buffer of their own
    gradients = set() if summed else _gradients(history, lives, model, weights, set())
    mixed = weights < 4 and (copies[4] > 0 or 4 in flat.values())
    found: dict[int, Role] = dict.fromkeys(gradients, (Category.GRADIENTS, "", weights))
    if mixed and not summed:
        copied = _gradients(history, lives, model, 4, gradients)
        found |= dict.fromkeys(copied, (Category.GRADIENTS, "", 4))
    roles = list(_roles(copies, weights, persistent_gradients=not gradients and not flat))
    found |= _persistent(lifetimes, lives.persistent, model, roles)
    found |= _flat_roles(flat, {role[0] for role in roles if copies.total})
    if weights == 4:
        found |= _casts(lifetimes, lives, model, found)
    labels = {
        index: Label(category, component, _DTYPES[width], Source.SIZE)
        for index, (category, component, width) in found.items()
    }
    return labels | _others(lifetimes, lives.persistent, model, labels)


def _flat(lifetimes: Sequence[Lifetime], persistent: Sequence[int], model: ExpectedModel) -> dict[int, int]:
    """Returns the blocks that hold all parameters, or one rank's share of them, and the bytes of an element."""
    found: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for index in persistent:
        size = lifetimes[index].nbytes
        if size >= _FLAT and size not in {part * width for part in model.parameters for width in WIDTHS}:
            groups.setdefault(size, []).append(index)
    for size, indices in groups.items():
        fitting = [
            width
            for ranks in _RANKS
            for width in (4, 2)
            if 0 <= size * ranks - model.elements * width <= model.elements * width * _PADDING + 16 * ranks
        ]
        if fitting:
            width = 4 if 4 in fitting and (len(indices) > 1 or 2 not in fitting) else fitting[0]
            found |= dict.fromkeys(indices, width)
    return found


def _flat_roles(flat: Mapping[int, int], known: set[Category]) -> dict[int, Role]:
    """Returns what flat buffers are for: in the order of birth what is not there in single blocks."""
    four = [index for index, width in flat.items() if width == 4]
    two = [index for index, width in flat.items() if width == 2]
    found: dict[int, Role] = {}
    if two and Category.WEIGHTS not in known:
        found[two.pop(0)] = Category.WEIGHTS, "trainable", 2
    found |= dict.fromkeys(two, (Category.GRADIENTS, "", 2))
    if Category.OPTIMIZER_STATE in known:
        return found | dict.fromkeys(four, (Category.GRADIENTS, "", 4))
    if four and Category.MASTER_WEIGHTS not in known:
        found[four.pop(0)] = Category.MASTER_WEIGHTS, "", 4
    if len(four) in (1, 3):
        found[four.pop(0)] = (Category.GRADIENTS, "", 4) if len(four) == 3 else (Category.OPTIMIZER_STATE, "", 4)
    return found | {
        index: (Category.OPTIMIZER_STATE, name, 4) for index, name in zip(four, _state_names(len(four)), strict=False)
    }


def _roles(copies: Copies, weights: int, *, persistent_gradients: bool) -> Iterator[Role]:
    """Yields what each copy of the model is for, in the order in which they are made.

    Weights come first. With float32 copies beside weights of two bytes, the first of those is what the optimizer
    updates. Where no step was seen to free its gradients and there is one copy more than the states of a common
    optimizer, the gradients stay. Beside 8-bit states there are no others.
    """
    trainable = Category.WEIGHTS, "trainable", weights
    yield trainable
    mixed = weights < 4 and copies[4] > 0
    rest = {width: copies[width] - (width == weights) for width in (4, 2, 1)}
    if mixed:
        yield Category.MASTER_WEIGHTS, "", 4
        rest[4] -= 1
    own = next((width for width in (4, weights) if rest[width] in (1, 3)), None) if persistent_gradients else None
    if own is not None and (rest[own] == 3 or (mixed and own == weights) or copies[1]):
        yield Category.GRADIENTS, "", own
        rest[own] -= 1
    names = _state_names(rest[4] + rest[2])
    for width in (4, 2):
        for _ in range(rest[width]):
            yield Category.OPTIMIZER_STATE, next(names), width
    for number in range(1, rest[1] + 1):
        yield Category.OPTIMIZER_STATE, f"{_STATE_8BIT}{number}", 1


def _state_names(count: int) -> Iterator[str]:
    """Yields the names that common optimizers give so many states."""
    if count == 1:
        yield "momentum_buffer"
        return
    yield from ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    yield from (f"state {number}" for number in range(4, 20))


def _persistent(
    lifetimes: Sequence[Lifetime], persistent: Sequence[int], model: ExpectedModel, roles: Sequence[Role]
) -> dict[int, Role]:
    """Gives the blocks of each size their roles, in the order of their birth."""
    places: dict[int, list[Role]] = {}
    for role in roles:
        for size, count in model.parameters.items():
            for part in parts_of(size, role[2]):
                places.setdefault(part.nbytes, []).extend([_role_of(part, role)] * count)
    found = {}
    for index in persistent:  # in the order of their birth
        left = places.get(lifetimes[index].nbytes)
        if left:
            found[index] = left.pop(0)
    return found


def _role_of(part: Part, role: Role) -> Role:
    category, component, _ = role
    if part.scales:
        component = component.replace(_STATE_8BIT, _SCALES_8BIT)
    return category, component, part.width


def _gradients(history: History, lives: Lives, model: ExpectedModel, width: int, taken: Collection[int]) -> set[int]:
    """Returns the blocks that are gradients of all parameters in some width.

    Of each step the last position is looked for at which all parameters have a block of their size that the step has
    made: in the optimizer's step. There, the oldest ones that the backward pass has made are the gradients: what is
    younger are temporaries of the optimizer. What else the forward pass has made must be gone; copies of gradients
    that are known need not show that. In a last step that was cut off, those that were made after its top are
    gradients, where steps before had any.
    """
    lifetimes = history.timeline.lifetimes
    found: set[int] = set()
    wanted = {size * width: count for size, count in model.parameters.items()}
    for number, step in enumerate(lives.of_steps):
        free = [index for index in step if index not in taken]
        full = _fullest(lifetimes, free, wanted, int(model.elements * width * _ALL))
        if full is not None:
            first, position = full
            top = history.top(lives.steps.boundaries[number], first)
            there = [index for index in free if _is_there(lifetimes[index], position)]
            there.sort(key=lambda index: (lifetimes[index].begin < top, index))
            chosen = _first(lifetimes, there, wanted)
            if taken or _forward_is_over(history, step, chosen, position, lives.steps.boundaries[number]):
                found |= chosen
        elif found and number == len(lives.steps.tops) - 1:
            top = lives.steps.tops[number]
            late = [index for index in free if lifetimes[index].begin >= top and lifetimes[index].end is None]
            found |= _first(lifetimes, late, wanted)
    return found


def _first(lifetimes: Sequence[Lifetime], indices: Sequence[int], wanted: Mapping[int, int]) -> set[int]:
    """Returns the first blocks of the wanted sizes, as many as are wanted."""
    left = dict(wanted)
    found = set()
    for index in indices:
        size = lifetimes[index].nbytes
        if left.get(size):
            left[size] -= 1
            found.add(index)
    return found


def _forward_is_over(history: History, step: Sequence[int], chosen: set[int], position: int, begin: int) -> bool:
    """Whether most of what the step has made before the last of the chosen blocks is gone at a position."""
    lifetimes = history.timeline.lifetimes
    last = max(lifetimes[index].begin for index in chosen)
    top = history.top(begin, last)
    older = [lifetimes[index] for index in step if index not in chosen and lifetimes[index].begin < last]
    at_top, now = (sum(life.nbytes for life in older if _is_there(life, at)) for at in (top, position))
    return now <= _MOST * at_top


def _fullest(
    lifetimes: Sequence[Lifetime], step: Sequence[int], wanted: Mapping[int, int], enough: int
) -> tuple[int, int] | None:
    """Returns the first and the last position at which most of the wanted blocks are there at once.

    None where it is not enough.
    """
    changes: list[tuple[int, int, int]] = []
    for index in step:
        life = lifetimes[index]
        if life.nbytes in wanted:
            changes.append((life.begin, 1, life.nbytes))
            if life.end is not None:
                changes.append((life.end, -1, life.nbytes))
    changes.sort()
    there: Counter[int] = Counter()
    matched = best = 0
    first = last = 0
    for at, delta, size in changes:
        before = min(there[size], wanted[size])
        there[size] += delta
        matched += size * (min(there[size], wanted[size]) - before)
        if matched > best:
            best, first, last = matched, at + 1, at + 1
        elif matched == best:
            last = at + 1
    return (first, last) if best and best >= enough else None


def _is_there(life: Lifetime, position: int) -> bool:
    return life.begin < position and (life.end is None or life.end >= position)


def _casts(
    lifetimes: Sequence[Lifetime], lives: Lives, model: ExpectedModel, taken: Mapping[int, Role]
) -> dict[int, Role]:
    """Returns the blocks that are copies of matrices in two bytes, which autocast makes in the forward pass."""
    wanted = {size * 2: count for size, count in model.matrices.items()}
    whole = 2 * sum(size * count for size, count in model.matrices.items())
    found: dict[int, Role] = {}
    for step in lives.of_steps:
        free = [index for index in step if index not in taken]
        full = _fullest(lifetimes, free, wanted, int(whole * _MOST))
        if full is None:
            continue
        position = full[0]
        left = dict(wanted)
        for index in free:
            size = lifetimes[index].nbytes
            if left.get(size) and _is_there(lifetimes[index], position):
                left[size] -= 1
                found[index] = (Category.TRANSIENT_WEIGHTS, "autocast", 2)
    return found


def _others(
    lifetimes: Sequence[Lifetime], persistent: Sequence[int], model: ExpectedModel, taken: Mapping[int, Label]
) -> dict[int, Label]:
    """Returns the model's buffers, and the workspaces that cuBLAS keeps."""
    left = dict(model.buffers)
    found = {}
    for index in persistent:
        size = lifetimes[index].nbytes
        if index in taken:
            continue
        if left.get(size):
            left[size] -= 1
            found[index] = Label(Category.BUFFERS, "", "", Source.SIZE)
        elif size in _WORKSPACES:
            found[index] = Label(Category.WORKSPACES, "cublas", "", Source.SIZE)
    return found

"""Which optimizers update a model: what is handed over, what wraps it, and what each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from memtrace.attribution.inputs import contents
from memtrace.attribution.optimizers.copies import Copies
from memtrace.guard import ask

_NO_PARTS = frozenset({"state", "param_groups", "defaults"})
"""Attributes of every optimizer of torch, as its hooks are: they hold no other optimizer, and may hold very much."""
_MAX_DEPTH = 8


class HandedOver(tuple[Any, ...]):
    """Optimizers as a framework hands them over: what is odd about them is no error of the user's, and never raised."""


class Optimizers(NamedTuple):
    """What is to be known of the optimizers of one model."""

    stepping: Sequence[torch.optim.Optimizer]
    """Those whose steps are counted: torch optimizers that update the model, the outermost of each chain."""
    parts: Mapping[int, Sequence[torch.optim.Optimizer]]
    """The torch optimizers that one of these wraps, by its identity, the outermost of them that update the model too:
    where it has other methods than `step` (sharpness-aware minimisation has two), theirs is the one that is called."""
    holding: Sequence[Any]
    """Those with parameter groups and state, wrappers and what they wrap included; each state once."""
    chained: Sequence[Any]
    """All of them, wrappers included that are no optimizers."""
    odd: Sequence[str]
    """What is wrong with each one given that does not update the model."""


def find_optimizers(
    given: object,
    model: nn.Module,
    owned: Callable[[torch.optim.Optimizer], bool] = lambda _: False,
    *,
    parameters: Sequence[torch.Tensor] | None = None,
) -> Optimizers:
    """Returns the optimizers that really step, inside wrappers and containers of any depth.

    Args:
        given: an optimizer or a wrapper of one, or a list or dictionary of them.
        model: the module that is trained.
        owned: returns whether an engine has put tensors of its own into an optimizer, which are not the model's then.
        parameters: those of the model, where somebody has listed them already.
    """
    trained = _Trained(list(model.parameters()) if parameters is None else parameters)
    stepping: dict[int, torch.optim.Optimizer] = {}
    parts: dict[int, Sequence[torch.optim.Optimizer]] = {}
    holding: dict[int, Any] = {}
    chained: dict[int, Any] = {}
    odd: list[str] = []

    def updates(optimizer: torch.optim.Optimizer) -> bool:
        return owned(optimizer) or trained.by(optimizer)

    for one in flat(given):
        chain = list(wrapping_chain(one))
        trained.take_keyed(chain)
        found = list(_stepping(one, updates, set()))
        if not found:
            odd.append(_what_is_odd(one, model))
            continue
        stepping |= {id(optimizer): optimizer for optimizer in found}
        chained |= {id(holder): holder for holder in chain}
        for optimizer in found:
            seen = {id(optimizer)}
            below = [part for held in _held(optimizer) for part in _stepping(held, updates, seen)]
            if below and not any(_is_same(part, optimizer) for part in below):
                parts[id(optimizer)] = below
        for optimizer in chain:
            groups, state = ask(getattr, optimizer, "param_groups", None), ask(getattr, optimizer, "state", None)
            if groups is not None and isinstance(state, Mapping):
                holding[id(state)] = optimizer  # the innermost of them: it lives as long as any
    return Optimizers(list(stepping.values()), parts, list(holding.values()), list(chained.values()), odd)


def wrapping_chain(optimizer: object) -> Iterator[Any]:
    """Yields the optimizer and everything that it wraps, however it is held, the outermost first."""
    yield from _chain(optimizer, set())


def _chain(optimizer: object, seen: set[int]) -> Iterator[Any]:
    for one in flat(optimizer):
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            for part in _held(one):
                yield from _chain(part, seen)


def _stepping(
    optimizer: object, updates: Callable[[torch.optim.Optimizer], bool], seen: set[int]
) -> Iterator[torch.optim.Optimizer]:
    """Yields the outermost torch optimizers, with hooks of their own, that update the model."""
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    if _steps(optimizer) and updates(optimizer):
        yield optimizer
        return
    for part in _held(optimizer):
        yield from _stepping(part, updates, seen)


def _steps(optimizer: object) -> TypeGuard[torch.optim.Optimizer]:
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", ())


def _is_same(part: torch.optim.Optimizer, wrapper: torch.optim.Optimizer) -> bool:
    """Whether a wrapper shares the hooks of what it wraps: whoever steps either of them is heard once."""
    return part._optimizer_step_pre_hooks is wrapper._optimizer_step_pre_hooks


def _held(optimizer: object) -> Iterator[object]:
    """Yields what an object holds that can be stepped: whatever its attribute is called, in containers too."""
    for part in attributes(optimizer).values():
        for one in flat(part):
            if not isinstance(one, (torch.Tensor, type)) and callable(ask(getattr, one, "step", None)):
                yield one


def attributes(optimizer: object) -> Mapping[str, object]:
    """Returns what an optimizer has beside what those of torch have, by name."""
    own = getattr(optimizer, "__dict__", {})
    found = {name: value for name, value in own.items() if name not in _NO_PARTS and "hook" not in name}
    if "optimizer" not in own:  # the name that wrappers give it where it is no plain attribute
        found["optimizer"] = ask(getattr, optimizer, "optimizer", None)
    return found


def flat(given: object, depth: int = 0) -> Iterator[object]:
    """Yields what lists, tuples and dictionaries hold, in order, and anything else as it is; eight levels deep.

    What a container of the user's holds that cannot be gone through is unknown.
    """
    if isinstance(given, (list, tuple, Mapping)):
        if depth < _MAX_DEPTH:
            for part in ask(contents, given) or ():
                yield from flat(part, depth + 1)
    elif given is not None:
        yield given


def _what_is_odd(given: object, model: nn.Module) -> str:
    stepping = [optimizer for optimizer in wrapping_chain(given) if _steps(optimizer)]
    if not stepping:
        return f"an optimizer must be a torch.optim.Optimizer, got {_instead_of_an_optimizer(given)}"
    count = sum(1 for optimizer in stepping for _ in optimizer_parameters(optimizer))
    return (
        f"{type(given).__name__} must hold parameters of the model or higher-precision copies of them; "
        f"none of its {count} parameters belongs to the given {type(model).__name__}: was it made for another model?"
    )


def _instead_of_an_optimizer(given: object) -> str:
    """Returns what was given in place of an optimizer, and what to write."""
    if isinstance(given, type):
        return f"the class {given.__name__}: write the optimizer itself, {given.__name__}(model.parameters(), ...)"
    if isinstance(given, Iterator) or torch.is_tensor(given):
        return f"{type(given).__name__}: write the optimizer, not model.parameters()"
    if isinstance(given, nn.Module):
        return f"{type(given).__name__}, a module: write MemTraceOptimizer(optimizer, model)"
    return f"{type(given).__name__}: write the optimizer that is stepped"


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yields the tensors of all parameter groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


class _Trained:
    """The parameters of a model, for all optimizers that are asked about."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._known = {id(parameter) for parameter in parameters}
        self._keyed: set[int] = set()
        self._copies: Copies | None = None

    def take_keyed(self, holders: Iterable[object]) -> None:
        """Notes optimizers that are held under a parameter of the model, as those are that update a copy of it."""
        for holder in holders:
            for held in attributes(holder).values():
                if isinstance(held, Mapping):
                    items = ask(lambda mapping: list(mapping.items()), held) or ()
                    self._keyed |= {id(optimizer) for key, optimizer in items if id(key) in self._known}

    def by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer updates one of them, or copies of them only."""
        ours = list(optimizer_parameters(optimizer))
        if id(optimizer) in self._keyed or any(id(parameter) in self._known for parameter in ours):
            return True
        self._copies = self._copies or Copies(self._parameters)
        return bool(ours) and all(map(self._copies.may_have, ours))

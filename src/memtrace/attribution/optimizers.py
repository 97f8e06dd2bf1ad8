"""What an optimizer holds: state by component, and master weights by role.

Roles, not element types, tell a master copy from a moment:

* a tensor of a parameter group that is no parameter of the model, with the shape of one that has a lower precision, is
  a master copy made before the optimizer was;
* a state tensor whose name says so (`master_param`, `fp32_copy`) is a master copy that the optimizer made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.storages import state_tensors
from memtrace.categories import Category
from memtrace.guard import ask

_MASTER_NAME = re.compile(r"master|fp32|float32|full_precision")


_HELD_AS = (
    "optimizer",  # Accelerate, DeepSpeed, apex
    "base",  # ScheduleFreeWrapper
    "optim",  # ZeroRedundancyOptimizer
    "base_optimizer",  # SAM, Lookahead
    "inner_optimizer",
    "_optimizer",
    "optimizers",
    "chained_optimizers",  # Megatron
    "optimizer_dict",  # layer-wise GaLore and APOLLO under Trainer: one for each parameter
)
"""Attributes under which wrappers hold what really steps: one optimizer, or several in a list or a dictionary."""


class HandedOver(tuple[Any, ...]):
    """Optimizers as a framework hands them over: what is odd about them is no error of the user's, and never raised."""


class Optimizers(NamedTuple):
    """What is to be known of the optimizers of one model."""

    stepping: Sequence[torch.optim.Optimizer]
    """Those whose steps are counted: torch optimizers that update the model, the outermost of each chain."""
    holding: Sequence[Any]
    """Those with parameter groups and state, wrappers and what they wrap included; each state once."""
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
    stepping: list[torch.optim.Optimizer] = []
    holding: dict[int, Any] = {}
    odd: list[str] = []
    for one in flat(given):
        found = list(_stepping(one, lambda optimizer: owned(optimizer) or trained.by(optimizer), set()))
        if not found:
            odd.append(_what_is_odd(one, model))
            continue
        stepping.extend(found)
        for holder in wrapping_chain(one):
            if hasattr(holder, "param_groups") and isinstance(getattr(holder, "state", None), Mapping):
                holding[id(holder.state)] = holder  # the innermost of them: it lives as long as any
    return Optimizers(list({id(optimizer): optimizer for optimizer in stepping}.values()), list(holding.values()), odd)


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


def _held(optimizer: object) -> Iterator[object]:
    for name in _HELD_AS:
        for part in flat(ask(getattr, optimizer, name, None)):
            if hasattr(part, "step") and not isinstance(part, type):
                yield part


def flat(given: object) -> Iterator[object]:
    """Yields what lists, tuples and dictionaries hold, in order, and anything else as it is."""
    if isinstance(given, (list, tuple, Mapping)):
        for part in given.values() if isinstance(given, Mapping) else given:
            yield from flat(part)
    elif given is not None:
        yield given


def _what_is_odd(given: object, model: nn.Module) -> str:
    stepping = [optimizer for optimizer in wrapping_chain(given) if _steps(optimizer)]
    if not stepping:
        return f"an optimizer must be a torch.optim.Optimizer, got {type(given).__name__}"
    count = sum(1 for optimizer in stepping for _ in optimizer_parameters(optimizer))
    return (
        f"{type(given).__name__} must hold parameters of the model or higher-precision copies of them; "
        f"none of its {count} parameters belongs to the given {type(model).__name__}: was it made for another model?"
    )


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yields the tensors of all parameter groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


class _Trained:
    """The parameters of a model, for all optimizers that are asked about."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._known = {id(parameter) for parameter in parameters}
        self._copies: _Copies | None = None

    def by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer updates one of them, or higher-precision copies only."""
        ours = list(optimizer_parameters(optimizer))
        if any(id(parameter) in self._known for parameter in ours):
            return True
        self._copies = self._copies or _Copies(self._parameters)
        return bool(ours) and all(map(self._copies.may_have, ours))


def claim_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], ledger: Ledger) -> None:
    """Claims the optimizer's parameters that are not among the model's `parameters`, and all tensors in its state.

    Call after `claim_model`: parameters that the ledger knows as weights stay weights.
    """
    claimed = {id(parameter) for parameter in parameters}
    copies: _Copies | None = None
    for parameter in optimizer_parameters(optimizer):
        if id(parameter) not in claimed and ledger.role_of(parameter) is None:
            copies = copies or _Copies(parameters)
            if copies.may_have(parameter):
                ledger.claim(parameter, Category.MASTER_WEIGHTS)
            else:
                ledger.claim(parameter, Category.WEIGHTS, "trainable")
    state: dict[str, list[torch.Tensor]] = {}
    for of_parameter in optimizer.state.values():
        for component, tensor in state_tensors(of_parameter):
            state.setdefault(component, []).append(tensor)
    for component, tensors in state.items():
        if _names_master(component):
            ledger.claim_all(tensors, Category.MASTER_WEIGHTS)
        else:
            ledger.claim_all(tensors, Category.OPTIMIZER_STATE, component)


@cache
def _names_master(component: str) -> bool:
    return _MASTER_NAME.search(component) is not None


class _Copies:
    """What master copies of a model's parameters can look like: asked for many tensors, looked up once."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._shapes: dict[int, set[torch.Size]] = {}
        self._elements: Counter[int] = Counter()
        for parameter in parameters:
            if parameter.is_floating_point():
                size = parameter.element_size()
                self._shapes.setdefault(size, set()).add(parameter.shape)
                self._elements[size] += parameter.numel()

    def may_have(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor has higher precision and the shape of a parameter, or is flat over several."""
        if not tensor.is_floating_point():
            return False
        lower = [size for size in self._shapes if size < tensor.element_size()]
        if any(tensor.shape in self._shapes[size] for size in lower):
            return True
        flat = tensor.dim() == 1 and bool(lower)
        return flat and tensor.numel() <= sum(self._elements[size] for size in lower) + _FLAT_PADDING


_FLAT_PADDING = 4096
"""Elements by which engines pad a flat master copy for alignment at most."""

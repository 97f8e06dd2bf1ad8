"""What an optimizer holds: state by component, and master weights by role.

Roles, not element types, tell a master copy from a moment:

* a tensor of a parameter group that is no parameter of the model, with the shape of one that has a lower precision, is
  a master copy made before the optimizer was;
* a state tensor whose name says so (`master_param`, `fp32_copy`) is a master copy that the optimizer made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.optimizers.copies import Copies
from memtrace.attribution.optimizers.finding import attributes, flat, optimizer_parameters
from memtrace.attribution.storages import state_tensors
from memtrace.guard import ask
from memtrace.record.categories import Category

_MASTER_NAME = re.compile(r"master|fp32|float32|full_precision")


def claim_optimizers(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[torch.Tensor], ledger: Ledger
) -> None:
    """Claims the optimizers' parameters that are not among the model's `parameters`, and all tensors in their states.

    Call after `claim_model`: parameters that the ledger knows as weights stay weights.
    """
    claimed, copies = {id(parameter) for parameter in parameters}, Copies(parameters)
    state: dict[str, list[torch.Tensor]] = {}
    for optimizer in optimizers:
        ours = list(optimizer_parameters(optimizer))
        others = [parameter for parameter in ours if id(parameter) not in claimed and not is_lazy(parameter)]
        for parameter in others:
            if ledger.role_of(parameter) is None:
                if copies.may_have(parameter, or_the_same=len(others) == len(ours)):
                    ledger.claim(parameter, Category.MASTER_WEIGHTS)
                else:
                    ledger.claim(parameter, Category.WEIGHTS, "trainable")
        for of_parameter in optimizer.state.values():
            for component, tensor in state_tensors(of_parameter):
                state.setdefault(component, []).append(tensor)
    for component, tensors in state.items():
        if _names_master(component):
            ledger.claim_all(tensors, Category.MASTER_WEIGHTS)
        else:
            ledger.claim_all(tensors, Category.OPTIMIZER_STATE, component)


def claim_kept_elsewhere(holders: Iterable[Any], ledger: Ledger) -> None:
    """Claims what optimizers and their wrappers keep outside of their state and nobody else has claimed.

    That are tensors in containers of any depth, as attributes (slow weights, moments by the names of parameters) or in
    parameter groups. The name of the attribute is the component. Call when all else is claimed.
    """
    for holder in holders:
        groups = ask(getattr, holder, "param_groups", None) or ()
        of_groups = [item for group in groups for item in group.items() if item[0] != "params"]
        for name, value in (*attributes(holder).items(), *of_groups):
            for component, tensor in _named_tensors(name, value):
                if ledger.role_of(tensor) is None:
                    master = _names_master(component)
                    category = Category.MASTER_WEIGHTS if master else Category.OPTIMIZER_STATE
                    ledger.claim(tensor, category, "" if master else component)


def _named_tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if name == "state":  # of a parameter group: as the state of an optimizer
        yield from state_tensors(value)
    else:
        yield from ((name, part) for part in flat(value) if isinstance(part, torch.Tensor))


@cache
def _names_master(component: str) -> bool:
    return _MASTER_NAME.search(component) is not None

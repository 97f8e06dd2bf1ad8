"""What an optimizer holds: state by component, and master weights by role.

Roles, not element types, tell a master copy from a moment:

* a tensor of a parameter group that is no parameter of the model, with the shape of one that has a lower precision, is
  a master copy made before the optimizer was;
* a state tensor whose name says so (`master_param`, `fp32_copy`) is a master copy that the optimizer made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.storages import state_tensors
from memtrace.categories import Category
from memtrace.errors import ConfigError

_MASTER_NAME = re.compile(r"master|fp32|float32|full_precision")


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer that does the step, inside wrappers such as Accelerate's that hold it as `.optimizer`."""
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            raise ConfigError(f"an optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


def wrapping_chain(optimizer: object) -> Iterator[object]:
    """Yields the optimizer and everything that it wraps as `.optimizer`, the outermost first."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yields the tensors of all parameter groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Checks that the optimizer updates this model, directly or through master copies.

    Raises:
        ConfigError: none of its parameters belongs to the model.
    """
    ours = list(optimizer_parameters(optimizer))
    known = {id(parameter) for parameter in ours}
    if any(id(parameter) in known for parameter in model.parameters()):
        return
    copies = _Copies(model.parameters())
    if ours and all(copies.may_have(parameter) for parameter in ours):
        return
    raise ConfigError(
        f"{type(optimizer).__name__} must hold parameters of the model or higher-precision copies of them; "
        f"none of its {len(ours)} parameters belongs to the given {type(model).__name__}: "
        "was it made for another model?"
    )


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

"""What a module holds: weights and buffers, the gradients of its parameters, and where it holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.held import Held
from memtrace.attribution.models.quantised import scales_of
from memtrace.errors import ConfigError
from memtrace.record.categories import Category


class HasParameters(Protocol):
    """A module, or what a walk over one has found: `held.Held`."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Returns each parameter once."""

    def buffers(self) -> Iterable[torch.Tensor]:
        """Returns each buffer once."""


class Role(NamedTuple):
    """What a storage is for, without its element type."""

    category: Category
    component: str = ""


def claim_model(
    model: nn.Module | Held, ledger: Ledger, role_of: Callable[[torch.Tensor], Role | None] = lambda _: None
) -> Sequence[nn.Parameter]:
    """Claims every parameter and buffer of the module; tied and shared ones count once.

    What quantised layers keep in buffers and attributes is frozen weights.

    Args:
        model: the module, or what it holds.
        ledger: where to claim.
        role_of: returns the role of a parameter that an engine has given another storage; None for plain weights.

    Returns:
        The parameters, for what else is to be known of them: to list them takes about as long as to claim them.
    """
    trainable, frozen = Role(Category.WEIGHTS, "trainable"), Role(Category.WEIGHTS, "frozen")
    held = model if isinstance(model, Held) else Held(model.modules())
    parameters = held.parameters()
    holders: dict[Role, list[torch.Tensor]] = {}
    for parameter in parameters:
        plain = trainable if parameter.requires_grad else frozen
        holders.setdefault(role_of(parameter) or plain, []).append(parameter)
        if type(parameter) is not nn.Parameter:
            holders.setdefault(plain, []).extend(scales_of(parameter))  # whole, whatever an engine does with the weight
    for role, tensors in holders.items():
        ledger.claim_all(tensors, role.category, role.component)
    ledger.claim_all(held.packed(), *frozen)
    ledger.claim_all(held.buffers(), Category.BUFFERS)
    return parameters


def claim_gradients(parameters: Iterable[torch.Tensor], ledger: Ledger) -> None:
    """Claims `.grad` of each parameter that has one."""
    gradients = (parameter.grad for parameter in parameters)
    ledger.claim_all((gradient for gradient in gradients if gradient is not None), Category.GRADIENTS)


def check_model(model: nn.Module) -> None:
    """Checks that there is something to train.

    Raises:
        ConfigError: it is no module, or has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {_instead_of_a_model(model)}")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"the model must have parameters, got a {type(model).__name__} without any")


def _instead_of_a_model(given: object) -> str:
    """Returns what was given in place of a model, and what to write."""
    if isinstance(given, type):
        return f"the class {given.__name__}: write the module itself, {given.__name__}(...)"
    kind = type(given).__name__
    if hasattr(given, "param_groups"):
        return (
            f"{kind}, an optimizer: model and optimizer are swapped, write MemoryTracer(model, optimizer) or "
            "MemTraceOptimizer(optimizer, model)"
        )
    if isinstance(given, Sequence) and given and all(isinstance(one, nn.Module) for one in given):
        return f"{kind} of modules: write nn.ModuleList([...])"
    if isinstance(given, Iterator) or (isinstance(given, Sequence) and any(map(torch.is_tensor, given))):
        return f"{kind}: write model, not model.parameters()"
    if isinstance(given, Mapping):
        modules = any(isinstance(one, nn.Module) for one in given.values())
        return (
            f"{kind} of modules: write nn.ModuleDict(...)"
            if modules
            else f"{kind}: write model, not model.state_dict()"
        )
    return f"{kind}: write the module that is trained"


def devices_of(parameters: Iterable[torch.Tensor]) -> dict[torch.device, int]:
    """Returns the bytes of a model's parameters by device; those on the meta device are on none."""
    held: dict[torch.device, int] = {}
    for parameter in parameters:
        device = parameter.device
        if device.type != "meta":
            held[device] = held.get(device, 0) + parameter.nbytes
    return held


def device_of(parameters: Iterable[torch.Tensor]) -> torch.device:
    """Returns the device that holds most of the bytes of a model's parameters; those on the meta device hold none.

    Raises:
        ConfigError: all parameters are on the meta device.
    """
    held = devices_of(parameters)
    if not held:
        raise ConfigError("the model must hold memory, got all parameters on the meta device: materialise it first")
    return max(held, key=held.__getitem__)

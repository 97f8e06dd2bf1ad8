"""Whose parameters an optimizer updates: the modules and optimizers of this process, found among all its objects."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtrace.attribution.optimizers.finding import HandedOver, find_optimizers, optimizer_parameters, wrapping_chain

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "deepspeed.")
"""Where the modules come from that wrap a model for its training: DDP, FSDP, a compiled model, DeepSpeed's engine."""
_GRAPHS = "torch.fx."
"""Where the graphs of torch's compiler come from, which hold parameters of the model that they are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained together."""

    model: nn.Module
    """The outermost module that holds what is trained; a `ModuleList` where there is more than one."""
    given: HandedOver
    """The optimizers that are there for it, the outermost of those that wrap each other."""
    stepping: Sequence[torch.optim.Optimizer]
    """Those of them, or inside them, whose steps are counted."""
    parts: Sequence[torch.optim.Optimizer]
    """Those that these wrap at any depth, which a loop may step instead."""


def training_of(optimizer: torch.optim.Optimizer, among: Sequence[Any] | None = None) -> Training | None:
    """Returns what an optimizer trains, with the others that train it beside it; None where no module is found.

    Looks at every object that Python's collector knows: about 0.1 s for a million of them. Optimizers that hold the
    same parameters as this one are left out: they are for another time.

    Args:
        optimizer: one that steps.
        among: the only optimizers, or parts of such, that may train beside it; None for all that there are.
    """
    modules, optimizers = _living()
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    mine = _outermost(optimizer, optimizers, modules)
    wanted = _parameters(mine)
    others = [one for one in optimizers if not wanted.keys() & _parameters(one).keys()]
    others = [one for one in others if not any(id(one) in _chain(whole) for whole in others if whole is not one)]
    if among is not None:
        stepped = set(map(id, among))
        others = [one for one in others if stepped & _chain(one)]
    roots = _roots(wanted, modules, parents)
    if not roots:  # the optimizer has copies of the parameters, as engines and loops with master weights do
        roots = [each for each in _tops(modules, parents) if _trains(mine, each)][:1]
    if not roots:
        return None
    for other in others:
        further = _roots(_parameters(other), modules, parents)
        roots += [root for root in further if not any(root is known for known in roots)]
    model = roots[0] if len(roots) == 1 else nn.ModuleList(roots)
    held = {id(parameter) for parameter in model.parameters()}
    given = HandedOver([mine, *(other for other in others if held & _parameters(other).keys())])
    found = find_optimizers(given, model, lambda one: id(one) in _chain(mine))
    inside = {id(one): one for whole in found.stepping for one in wrapping_chain(whole)}
    counted = {id(one) for one in found.stepping}
    parts = [one for key, one in inside.items() if key not in counted and isinstance(one, torch.optim.Optimizer)]
    return Training(model=model, given=given, stepping=found.stepping, parts=parts)


def _living() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    """Returns the modules and the optimizers of this process, asking no object for anything."""
    everything = gc.get_objects()
    kinds = set(map(type, everything))
    modules, optimizers = (
        {kind for kind in kinds if base in kind.__mro__} for base in (nn.Module, torch.optim.Optimizer)
    )
    trained = [one for one in everything if type(one) in modules]
    return [one for one in trained if "_modules" in vars(one)], [one for one in everything if type(one) in optimizers]


def _outermost(optimizer: Any, optimizers: Iterable[Any], modules: Iterable[nn.Module]) -> Any:
    """Returns what wraps an optimizer, as an attribute of a module where an engine has it; else the optimizer."""
    for module in modules:
        held = vars(module).get("optimizer")
        if held is not None and id(optimizer) in _chain(held):
            return held
    others = [one for one in optimizers if vars(one) is not vars(optimizer)]  # it, and a view of it as ours is
    around = [one for one in others if id(optimizer) in _chain(one)]
    return max(around, key=lambda one: len(_chain(one)), default=optimizer)


def _chain(optimizer: object) -> set[int]:
    return {id(one) for one in wrapping_chain(optimizer)}


def _parameters(optimizer: object) -> dict[int, torch.Tensor]:
    """Returns the parameters of an optimizer and of all that it wraps, by their identity."""
    chain = [one for one in wrapping_chain(optimizer) if "param_groups" in vars(one)]
    return {id(parameter): parameter for one in chain for parameter in optimizer_parameters(one)}


def _roots(wanted: Iterable[int], modules: Iterable[nn.Module], parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Returns the outermost modules that hold the wanted parameters, as few as hold all that any module holds."""
    missing = set(wanted)
    owners = [one for one in modules if any(id(parameter) in missing for parameter in one._parameters.values())]
    tops = [(top, {id(parameter) for parameter in top.parameters()}) for top in _above(owners, parents)]
    found: list[nn.Module] = []
    while tops:
        best, held = max(tops, key=lambda top: (len(top[1] & missing), _place(top[0]), -len(top[1])))
        if not held & missing:
            break
        found.append(best)
        missing -= held
    return found


def _place(module: nn.Module) -> int:
    """Returns how likely a module is the one that the loop calls, of several with the same parameters."""
    home = type(module).__module__
    return 1 if home.startswith(_WRAPPERS) else -1 if home.startswith(_GRAPHS) else 0


def _above(modules: Iterable[nn.Module], parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Returns the modules above some that have none above them, in no particular order."""
    seen: dict[int, nn.Module] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen[id(module)] = module
            waiting += parents.get(id(module), ())
    return [module for module in seen.values() if id(module) not in parents]


def _tops(modules: Iterable[nn.Module], parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Returns the modules that no other one holds and that have gradients to be used, the largest first."""
    tops = [(one, list(one.parameters())) for one in modules if id(one) not in parents]
    trained = [(one, held) for one, held in tops if any(parameter.requires_grad for parameter in held)]
    trained.sort(key=lambda top: -sum(parameter.numel() for parameter in top[1]))
    return [one for one, _ in trained]


def _trains(optimizer: Any, module: nn.Module) -> bool:
    """Whether the optimizer is the module's own, as an engine's is, or has copies of its parameters."""
    if vars(module).get("optimizer") is optimizer:
        return True
    return bool(find_optimizers(HandedOver([optimizer]), module).stepping)

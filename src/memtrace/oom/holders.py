"""Which modules hold the memory: names for addresses, and the largest holders by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memtrace.attribution.optimizers.finding import optimizer_parameters
from memtrace.attribution.storages import state_tensors, storages_of
from memtrace.oom.composition import Holding
from memtrace.record.categories import Category
from memtrace.record.oom.report import Holder, LargeBlock

MAX_HOLDERS = 20
"""Names in a report: with layers taken together, more than most models have."""
MAX_BLOCKS = 10

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def module_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> dict[int, str]:
    """Returns the name of the module that each live storage is kept for, by the storage's address.

    Parameters, buffers, gradients and optimizer state have one. A storage that several modules share (a flat buffer, a
    tied weight) has the name of the first. Costs about 2 us a tensor.
    """
    names: dict[int, str] = {}
    for tensor, name in _named_tensors(model, optimizers):
        for storage, _, _ in storages_of(tensor, device):
            names.setdefault(storage.data_ptr(), name)
    return names


def largest_holders(holdings: Sequence[Holding], names: Mapping[int, str]) -> tuple[Holder, ...]:
    """Returns the modules for which most is kept; modules that differ in numbers only are one holder."""
    sizes: dict[str, dict[Category, int]] = {}
    members: dict[str, set[str]] = {}
    for holding in holdings:
        name = names.get(holding.address)
        if name is None:
            continue
        pattern = _NUMBER.sub("*", name)
        members.setdefault(pattern, set()).add(name)
        categories = sizes.setdefault(pattern, {})
        categories[holding.key.category] = categories.get(holding.key.category, 0) + holding.nbytes
    holders = [
        Holder(
            name=pattern,
            modules=len(members[pattern]),
            categories=dict(sorted(categories.items(), key=lambda item: -item[1])),
        )
        for pattern, categories in sizes.items()
    ]
    return tuple(sorted(holders, key=lambda holder: -holder.total_bytes)[:MAX_HOLDERS])


def largest_blocks(holdings: Sequence[Holding], names: Mapping[int, str]) -> tuple[LargeBlock, ...]:
    """Returns the largest blocks, each with the module that it is kept for."""
    largest = sorted(holdings, key=lambda holding: -holding.nbytes)[:MAX_BLOCKS]
    return tuple(
        LargeBlock(nbytes=holding.nbytes, key=holding.key, module=names.get(holding.address)) for holding in largest
    )


def repeated_blocks(model: nn.Module) -> int:
    """Returns how many layers the longest list of modules in the model has; 0 where it has no list."""
    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=0)


def _named_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[torch.Tensor, str]]:
    homes: dict[int, str] = {}
    for name, weight in model.named_parameters():
        home = homes[id(weight)] = name.rpartition(".")[0]
        yield weight, home
        if weight.grad is not None:
            yield weight.grad, home
    for name, buffer in model.named_buffers():
        yield buffer, name.rpartition(".")[0]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and not is_lazy(parameter)]
    for optimizer in optimizers:
        updated = [parameter for parameter in optimizer_parameters(optimizer) if not is_lazy(parameter)]
        if [parameter.shape for parameter in updated] == [parameter.shape for parameter in trainable]:
            for copy, weight in zip(updated, trainable, strict=True):  # master copies, in the order of the model
                homes.setdefault(id(copy), homes[id(weight)])
        for parameter in updated:
            copied_from = homes.get(id(parameter))
            if copied_from is not None:
                yield parameter, copied_from
                if parameter.grad is not None:
                    yield parameter.grad, copied_from
        for parameter, state in optimizer.state.items():
            owner = homes.get(id(parameter))
            if owner is not None:
                for _, tensor in state_tensors(state):
                    yield tensor, owner

"""FSDP2 (`fully_shard`): sharded parameters, gathered copies and the buffers of its collectives.

Run with torch 2.13. `fully_shard` changes the class of each module that it shards to an `FSDPModule`, and keeps the
tensors in parameter groups: a sharded DTensor for each parameter, which the optimizer updates, and storages for the
gathered copies, which are resized to nothing when they are not needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.model import Role
from memtrace.categories import Category
from memtrace.sources import torch_private

_GATHERED = Role(Category.TRANSIENT_WEIGHTS, "all_gather")


def find(model: nn.Module, optimizers: Sequence[object]) -> Engine | None:
    """Returns the engine where at least one module of the model is sharded with `fully_shard`; else None."""
    library = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(library, "FSDPModule", None)
    if sharded is None or not any(isinstance(module, sharded) for module in model.modules()):
        return None
    return FsdpEngine(model, sharded)


class FsdpEngine(Engine):
    """FSDP2 with any policy for mixed precision, resharding and offload.

    Args:
        model: the root module.
        sharded: the class that `fully_shard` gives to modules.
    """

    name = "FSDP2"
    shards = True

    def __init__(self, model: nn.Module, sharded: type) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, sharded)]
        self._groups = [group for module in self._modules for group in torch_private.fsdp_groups(module)]

    @property
    def device(self) -> torch.device | None:
        """Returns the device of the mesh: offloaded shards are on the CPU between the steps of their modules."""
        return self._groups[0].device if self._groups else None

    def claim(self, ledger: Ledger) -> None:
        """Claims the shard of each parameter, its gradient, and what is gathered now."""
        for parameter in self._parameters():
            role = _role_of_shard(parameter)
            ledger.claim(parameter.sharded_param, role.category, role.component)
        for gradient in self.gradients():
            ledger.claim(gradient, Category.GRADIENTS)
        self.claim_passing(ledger)
        for module in self._modules:
            self.claim_gathered(module, ledger)

    def claim_passing(self, ledger: Ledger) -> None:
        """Claims the buffers of collectives."""
        for group in self._groups:
            for tensor in torch_private.fsdp_gather_buffers(group):
                ledger.claim(tensor, Category.COMM_BUFFERS, "all_gather")
            for tensor in torch_private.fsdp_reduce_buffers(group):
                ledger.claim(tensor, Category.COMM_BUFFERS, "reduce_scatter")

    def claim_gathered(self, module: nn.Module, ledger: Ledger) -> None:
        """Claims the full weights of a sharded module, in the precision that it computes in."""
        for group in torch_private.fsdp_groups(module):
            for parameter in group.fsdp_params:
                for tensor in parameter.all_gather_outputs:
                    ledger.claim(tensor, _GATHERED.category, _GATHERED.component)

    def gradients(self) -> Iterable[torch.Tensor]:
        """Returns gradients that wait for a reduction because the last backward pass issued none."""
        for parameter in self._parameters():
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns master weights for a shard that a lower-precision copy is made of; transient for that copy."""
        for known in self._parameters():
            if parameter is known.sharded_param:
                return _role_of_shard(known)
            if parameter is torch_private.fsdp_gathered_parameter(known):
                return _GATHERED
        return None

    def gathering_modules(self) -> Iterator[nn.Module]:
        """Yields the modules that were given to `fully_shard`."""
        yield from self._modules

    def gradient_leaves(self) -> Iterator[nn.Parameter]:
        """Yields the gathered parameters that autograd sees; they exist from the first forward pass on."""
        for parameter in self._parameters():
            gathered = torch_private.fsdp_gathered_parameter(parameter)
            if gathered is not None:
                yield gathered

    def _parameters(self) -> Iterator[Any]:
        for group in self._groups:
            yield from group.fsdp_params


def _role_of_shard(parameter: Any) -> Role:
    shard, compute = parameter.sharded_param, parameter.mp_policy.param_dtype
    if not shard.requires_grad:
        return Role(Category.WEIGHTS, "frozen")
    if compute is not None and compute.itemsize < shard.dtype.itemsize:
        return Role(Category.MASTER_WEIGHTS, "sharded")
    return Role(Category.WEIGHTS, "trainable")

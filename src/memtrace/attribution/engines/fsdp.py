"""FSDP2 (`fully_shard`): sharded parameters, gathered copies and the buffers of its collectives.

Up to torch 2.11 a module has one group at most. `fully_shard` changes the class of each module that it
shards to an `FSDPModule`, and keeps the tensors in parameter groups: a sharded DTensor for each parameter, which the
optimizer updates, and storages for the gathered copies, which are resized to nothing when they are not needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import Role
from memtrace.record.categories import Category
from memtrace.record.limitations import unread_engine
from memtrace.sources import engines_torch_private

_GATHERED = Role(Category.TRANSIENT_WEIGHTS, "all_gather")


def find(model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module]) -> Engine | None:
    """Returns the engine where at least one module of the model is sharded with `fully_shard`; else None."""
    library = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(library, "FSDPModule", None)
    if sharded is None:
        return None
    found = [module for module in modules if isinstance(module, sharded)]
    return FsdpEngine(found) if found else None


class FsdpEngine(Engine):
    """FSDP2 with any policy for mixed precision, resharding and offload.

    Args:
        modules: those that were given to `fully_shard`, the outermost first.
    """

    name = "FSDP2"
    shards = True
    leaves_gradients = True

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        groups = [engines_torch_private.fsdp_groups(module) for module in modules]
        self._groups = [group for found in groups for group in found or ()]
        if None in groups:
            keeps = "gathered weights and the buffers of its collectives"
            self.limitation = unread_engine(self.name, keeps, torch.__version__)
        self._known: dict[int, tuple[Any, Any]] = {}
        """The group and FSDP2's own record of each parameter, by the identity of its sharded and its gathered form."""
        self._contexts: Sequence[Any] = ()
        self._at_work: Any = None
        """The group that was heard of last."""
        self._until_look = 0
        """Calls of `claim_passing` until it looks at every group."""
        self._look_at_parameters()

    @property
    def device(self) -> torch.device | None:
        """Returns the device of the mesh: offloaded shards are on the CPU between the steps of their modules."""
        return self._groups[0].device if self._groups else None

    def claim(self, ledger: Ledger) -> None:
        """Claims the shard of each parameter, its gradient, and what is gathered now."""
        self._look_at_parameters()
        for parameter in self._parameters():
            role = _role_of_shard(parameter)
            ledger.claim(parameter.sharded_param, role.category, role.component)
            ledger.claim_all(parameter.all_gather_outputs, _GATHERED.category, _GATHERED.component)
        for gradient in self.gradients():
            ledger.claim(gradient, Category.GRADIENTS)
        self.claim_kept(ledger)

    def claim_passing(self, ledger: Ledger) -> None:
        """Claims the buffers of collectives.

        What all groups share is looked at in each call. A group has some of its own while it is gathered ahead of its
        turn: then another group is at work than before. All are looked at when that changes, and else as seldom as to
        add nothing to what a call takes.
        """
        if self._until_look <= 0:
            self._until_look = len(self._groups)
            self._contexts = engines_torch_private.fsdp_contexts(self._groups)
            for group in self._groups:
                for collective, tensor in engines_torch_private.fsdp_group_buffers(group):
                    ledger.claim(tensor, Category.COMM_BUFFERS, collective)
        self._until_look -= 1
        for context in self._contexts:
            for collective, tensor in engines_torch_private.fsdp_context_buffers(context):
                ledger.claim(tensor, Category.COMM_BUFFERS, collective)

    def claim_kept(self, ledger: Ledger) -> None:
        """Claims the buffers of collectives that are kept beyond the end of a step, whichever group has them."""
        self._until_look = 0
        self.claim_passing(ledger)

    def claim_gathered(self, module: nn.Module, ledger: Ledger) -> None:
        """Claims the full weights of a sharded module, in the precision that it computes in."""
        for group in engines_torch_private.fsdp_groups(module) or ():
            self._works(group)
            for parameter in group.fsdp_params:
                self._look_at(group, parameter)
                ledger.claim_all(parameter.all_gather_outputs, _GATHERED.category, _GATHERED.component)

    def gradients(self) -> Iterable[torch.Tensor]:
        """Returns gradients that wait for a reduction because the last backward pass issued none."""
        for parameter in self._parameters():
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns master weights for a shard that a lower-precision copy is made of; transient for that copy."""
        group, known = self._known.get(id(parameter), (None, None))
        if known is None:
            return None
        if parameter is known.sharded_param:
            return _role_of_shard(known)
        if parameter is not engines_torch_private.fsdp_gathered_parameter(known):
            return None  # another one at the address of one that is gone
        self._works(group)
        return _GATHERED

    def gathering_modules(self) -> Iterator[nn.Module]:
        """Yields the modules that were given to `fully_shard`."""
        yield from self._modules

    def gradient_leaves(self) -> Iterator[nn.Parameter]:
        """Yields the gathered parameters that autograd sees; they exist from the first forward pass on."""
        for parameter in self._parameters():
            gathered = engines_torch_private.fsdp_gathered_parameter(parameter)
            if gathered is not None:
                yield gathered

    def _works(self, group: Any) -> None:
        """Notes that a group is at work: another one may have been gathered ahead."""
        if group is not self._at_work:
            self._at_work, self._until_look = group, 0

    def _look_at_parameters(self) -> None:
        """Learns the parameters anew: FSDP2 makes another sharded form when the model is moved."""
        self._known.clear()
        for group in self._groups:
            for parameter in group.fsdp_params:
                self._look_at(group, parameter)

    def _look_at(self, group: Any, parameter: Any) -> None:
        self._known[id(parameter.sharded_param)] = group, parameter
        gathered = engines_torch_private.fsdp_gathered_parameter(parameter)
        if gathered is not None:
            self._known[id(gathered)] = group, parameter

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

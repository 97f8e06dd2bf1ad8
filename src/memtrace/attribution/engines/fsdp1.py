"""FSDP1 (`FullyShardedDataParallel`): flat parameters, their shards, gathered copies and reduced gradients.

Run with torch 2.13. A wrapper flattens the parameters of the module in it into one, and keeps as attributes of that one
the shard of this rank, which the optimizer updates, and storages for the gathered copy, which are resized to nothing
when they are not needed. With `use_orig_params` the module lists views of the shard; else the flat parameter itself.
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
from memtrace.sources.engines_torch_private import FlatParameter

_GATHERED = Role(Category.TRANSIENT_WEIGHTS, "all_gather")


def find(model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module]) -> Engine | None:
    """Returns the engine where at least one module of the model is a FullyShardedDataParallel; else None."""
    library = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(library, "FullyShardedDataParallel", None)
    if wrapper is None:
        return None
    found = [module for module in modules if isinstance(module, wrapper)]
    return FlatFsdpEngine(found) if found else None


class FlatFsdpEngine(Engine):
    """FSDP1 with any sharding strategy, mixed precision and offload.

    Args:
        wrappers: the FullyShardedDataParallel modules, the outermost first.
    """

    name = "FSDP1"
    shards = True

    def __init__(self, wrappers: Sequence[Any]) -> None:
        self._wrappers = wrappers
        self._flat: list[FlatParameter] = []
        self._known: dict[int, tuple[torch.Tensor, FlatParameter]] = {}
        """The flat parameter of each parameter that it is or that is a view of it, by identity."""
        self._look()
        if not all(map(engines_torch_private.shows_flat_parameter, wrappers)):
            self.limitation = unread_engine(self.name, "shards, gathered weights and gradients", torch.__version__)

    @property
    def device(self) -> torch.device | None:
        """Returns the device that computes: offloaded shards are on the CPU."""
        return next((flat.device for flat in self._flat), None)

    def claim(self, ledger: Ledger) -> None:
        """Claims the shard of each flat parameter, its gradients, and what is gathered now."""
        self._look()
        for flat in self._flat:
            role = _role_of_shard(flat)
            ledger.claim(flat.shard, role.category, role.component)
            ledger.claim_all(flat.gathered(), _GATHERED.category, _GATHERED.component)
        ledger.claim_all(self.gradients(), Category.GRADIENTS)

    def claim_gathered(self, module: nn.Module, ledger: Ledger) -> None:
        """Claims the flat parameter that a wrapper has put together for the module in it."""
        for wrapper in self._wrappers:
            if wrapper.module is module:
                flat = engines_torch_private.flat_parameter(wrapper)
                if flat is not None:
                    ledger.claim_all(flat.gathered(), _GATHERED.category, _GATHERED.component)

    def gradients(self) -> Iterable[torch.Tensor]:
        """Returns the gradients of flat parameters: whole ones that were not reduced yet, and shards."""
        for flat in self._flat:
            yield from flat.gradients()

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns what the storage is for that a flat parameter, or a view of one, has now."""
        known, flat = self._known.get(id(parameter), (None, None))
        if flat is None or known is not parameter:
            return None
        sharded = parameter.untyped_storage().data_ptr() == flat.shard.untyped_storage().data_ptr()
        return _role_of_shard(flat) if sharded else _GATHERED

    def gathering_modules(self) -> Iterator[nn.Module]:
        """Yields the module in each wrapper: the wrapper gathers in its own forward pass, before that of the module."""
        for wrapper in self._wrappers:
            yield wrapper.module

    def gradient_leaves(self) -> Iterator[nn.Parameter]:
        """Yields the flat parameters, which the model does not list with `use_orig_params`."""
        for flat in self._flat:
            yield flat.parameter

    def _look(self) -> None:
        """Learns the flat parameters anew: FSDP1 makes another shard when the model is moved."""
        found = map(engines_torch_private.flat_parameter, self._wrappers)
        self._flat = [flat for flat in found if flat is not None]
        self._known = {id(tensor): (tensor, flat) for flat in self._flat for tensor in (flat.parameter, *flat.views)}


def _role_of_shard(flat: FlatParameter) -> Role:
    if not flat.parameter.requires_grad:
        return Role(Category.WEIGHTS, "frozen")
    if flat.computes_in.itemsize < flat.shard.dtype.itemsize:
        return Role(Category.MASTER_WEIGHTS, "sharded")
    return Role(Category.WEIGHTS, "trainable")

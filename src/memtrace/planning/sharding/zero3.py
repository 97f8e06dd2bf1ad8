"""One rank's view of DeepSpeed's ZeRO-3, run on tensors without memory.

What DeepSpeed allocates is modelled after version 0.19, runtime/zero/stage3.py; when it gathers weights is in
`zero3_fetching`, how it hears of modules in `zero3_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate, chain, pairwise

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import Role
from memtrace.planning.optimizers.updates import MakeOptimizer
from memtrace.planning.sharding.shares import Offload, Sharding
from memtrace.planning.sharding.updates import ShardedUpdates
from memtrace.planning.sharding.zero import OnHost, gradient_norm
from memtrace.planning.sharding.zero3_fetching import Fetching, ShardedParameter
from memtrace.planning.sharding.zero3_modules import follow_modules
from memtrace.record.categories import Category
from memtrace.simulation.kernels import Target
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.hooks import HookSet


class Zero3Updates(ShardedUpdates):
    """Shards of weights, masters, states and gradients; whole weights while they are used."""

    prepares_gradients = True

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, sharding: Sharding, target: Target, host: OnHost
    ) -> None:
        self._host = nullcontext if sharding.offload is Offload.NONE else host
        """Where masters, states and reduced gradients are made."""
        self._shards_on = host if sharding.offloads_weights else nullcontext
        """Where the shares of the weights are made."""
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sharding, self._target = sharding, target
        self._gathered: dict[tuple[int, int], nn.Parameter] = {}
        """Parameters by storage and offset where they were gathered last; those of a rank alone share one storage."""
        self._hooks = HookSet()
        self._hooks.after_gradient(self._parameters, self._has_gradient)  # made while they have their shapes
        dtype = self._parameters[0].dtype
        self._known = _known_parameters(model, sharding)
        self._beside: dict[nn.Parameter, ShardedParameter] = {}
        """Parameters of further models."""
        trained = [self._known[parameter] for parameter in self._parameters]
        self.fetching = self._fetching_of(model, self._known)
        shares = sum(known.share for known in trained)
        with self._shards_on():
            self._shards = torch.empty(shares, dtype=dtype, device=DEVICE)
        for known, shard in zip(trained, torch.split(self._shards, [known.share for known in trained]), strict=True):
            known.shard = shard
        for parameter, known in self._known.items():
            if not parameter.requires_grad:
                known.shard = self._frozen_shard(known)
        groups = _sub_groups([known.share for known in trained], sharding.zero3.sub_group)
        bounds = list(pairwise(accumulate(groups, initial=0)))
        self._bounds = bounds
        with self._host():
            parts = [self._shards[begin:end] for begin, end in bounds]
            self._masters = [part.to(torch.float32, copy=True).requires_grad_() for part in parts]
            self._gradients = torch.zeros(shares, dtype=dtype, device=DEVICE)
            self._float32_gradients = None if self._host is nullcontext else torch.zeros_like(self._gradients).float()
        self.optimizer = make_optimizer(self._masters)
        self._bucket = torch.empty(sharding.reduce_bucket, dtype=dtype, device=DEVICE)
        ends = chain([0], accumulate(known.share for known in trained))
        self._places = {known: slice(*bound) for known, bound in zip(trained, pairwise(ends), strict=True)}
        self._overflow = torch.zeros(1, dtype=torch.bool, device=DEVICE)
        self._norm: torch.Tensor | None = None
        self._waiting: list[nn.Parameter] = []
        self._filled = 0
        follow_modules(model, self.fetching, self._hooks)

    def claim(self, ledger: Ledger) -> None:
        """Claims shards, masters, gradients and buffers."""
        super().claim(ledger)
        for parameter, known in self._known.items():
            assert known.shard is not None
            ledger.claim(known.shard, Category.WEIGHTS, "trainable" if parameter.requires_grad else "frozen")
        for master in self._masters:
            ledger.claim(master, Category.MASTER_WEIGHTS)
        ledger.claim(self._gradients, Category.GRADIENTS)
        ledger.claim(self._bucket, Category.COMM_BUFFERS, "reduce")
        ledger.claim(self._overflow, Category.BUFFERS, "overflow")
        if self._norm is not None:
            ledger.claim(self._norm, Category.BUFFERS, "grad_norm")

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns what whole weights are: small ones are kept from step to step, one rank alone has its shards."""
        # a key like any other where it is no parameter
        known = self._known.get(parameter) or self._beside.get(parameter)  # type: ignore[call-overload]
        if known is None or self._sharding.world_size == 1:
            return None
        return Role(Category.WEIGHTS, "gathered") if known.persists else Role(Category.TRANSIENT_WEIGHTS, "all_gather")

    def saved_as(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the parameter where its gathered weights are saved: they are released after each module."""
        parameter = self._gathered.get(_place(tensor))
        if parameter is None or parameter.untyped_storage() is not tensor.untyped_storage():
            return None
        return parameter if parameter.shape == tensor.shape and parameter.stride() == tensor.stride() else None

    def updates_per_step(self, optimizer: torch.optim.Optimizer) -> int:
        """Returns the number of sub-groups."""
        return len(self._masters)

    def micro_batch_ends(self) -> None:
        """Reduces what is left, and releases what has no end of its own."""
        with torch.no_grad():
            self._reduce()
            self.fetching.pass_ends()

    def step(self) -> None:
        """Updates the sub-groups one after the other, and gathers small parameters again."""
        with torch.no_grad():
            self.fetching.release_all(self._known.values())
        with self._host():
            self._update()
        with torch.no_grad():
            self.fetching.gather_whole([known for known in self._known.values() if known.persists])

    def shard_beside(self, model: nn.Module) -> None:
        """Shares a further model out, as DeepSpeed does one that it gets without an optimizer: it is gathered alike."""
        known = _known_parameters(model, self._sharding)
        fetching = self._fetching_of(model, known)
        for parameter, one in known.items():
            one.shard = self._frozen_shard(one)
            parameter.ds_tensor = one.shard  # type: ignore[attr-defined]  # DeepSpeed's name: what is claimed for it
        self._beside |= known
        follow_modules(model, fetching, self._hooks)

    def _update(self) -> None:
        with torch.no_grad():
            parts = [self._gradients[place] for place in self._places.values()]
            self._norm = self.note(gradient_norm(parts), Category.BUFFERS, "grad_norm")
            del parts
        for master, (begin, end) in zip(self._masters, self._bounds, strict=True):
            with torch.no_grad():
                master.grad = self._float32_gradient(begin, end)
            self.optimizer.param_groups[0]["params"] = [master]
            self.optimizer.step()
            with torch.no_grad():
                self._shards[begin:end].copy_(master)
                master.grad = None
        self.optimizer.param_groups[0]["params"] = self._masters

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()

    def _fetching_of(self, model: nn.Module, known: Mapping[nn.Parameter, ShardedParameter]) -> Fetching:
        """Returns what gathers the weights of a model; it has released them all."""
        held = {module: [known[own] for own in module.parameters(recurse=False)] for module in model.modules()}
        fetching = Fetching(
            held,
            self._sharding.zero3,
            self._sharding.world_size,
            on_gloo=self._target is Target.CPU,
            from_host=self._sharding.offloads_weights,
            note=self._note_gather,
        )
        fetching.release_all(known.values())
        return fetching

    def _frozen_shard(self, known: ShardedParameter) -> torch.Tensor:
        with self._shards_on():
            return torch.empty(known.share, dtype=known.parameter.dtype, device=DEVICE)

    def _note_gather(self, tensor: torch.Tensor, known: ShardedParameter | None) -> None:
        if known is None:
            self.note(tensor, Category.COMM_BUFFERS, "all_gather")
            return
        role = self.role_of(known.parameter)
        if role is not None:
            self.note(tensor, role.category, role.component)
        self._gathered[_place(tensor)] = known.parameter

    def _float32_gradient(self, begin: int, end: int) -> torch.Tensor:
        """DeepSpeed flattens the gradients of a sub-group before it converts them; offloaded, they are kept so."""
        if self._float32_gradients is not None:
            return self._float32_gradients[begin:end]
        parts = [self._gradients[place] for place in self._places.values() if begin <= place.start < end]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return flat.to(torch.float32)

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        """Copies a gradient into the bucket; one that does not fit stays where it is."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        size = parameter.grad.numel()
        with torch.no_grad():
            if self._filled and self._filled + size > self._sharding.reduce_bucket:
                self._reduce()
            if self._filled + size <= self._sharding.reduce_bucket:
                place = self._bucket[self._filled : self._filled + size].view_as(parameter.grad)
                place.copy_(parameter.grad)
                parameter.grad = place
        self._waiting.append(parameter)
        self._filled += size

    def _reduce(self) -> None:
        """Reduces and scatters the bucket through a tensor with the shares of each rank side by side, padded."""
        if not self._waiting:
            return
        known = [self._known[parameter] for parameter in self._waiting]
        elements = sum(one.share for one in known) * self._sharding.world_size
        alone = len(known) == 1 and known[0].elements == elements
        flat = self._gradients if alone else torch.empty(elements, dtype=self._gradients.dtype, device=DEVICE)
        if self._target is Target.CPU:
            torch.empty(elements, dtype=self._gradients.dtype, device=DEVICE)  # gloo reduces a copy
        for parameter in self._waiting:
            parameter.grad = None
        del flat
        self._waiting, self._filled = [], 0


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor.untyped_storage()), int(tensor.storage_offset())


def _known_parameters(model: nn.Module, sharding: Sharding) -> dict[nn.Parameter, ShardedParameter]:
    """Returns the parameters of a model that are shared out, whole as they are now."""
    return {
        parameter: ShardedParameter(
            parameter=parameter,
            number=number,
            shape=parameter.shape,
            share=-(-parameter.numel() // sharding.world_size),
            persists=parameter.numel() <= sharding.zero3.persistence_threshold,
            gathered=True,
        )
        for number, parameter in enumerate(model.parameters())
    }


def _sub_groups(shares: Sequence[int], limit: int) -> list[int]:
    """Returns the elements of each sub-group: full with the parameter that takes it to the limit."""
    if sum(shares) <= limit:
        return [sum(shares)]
    groups, elements = [], 0
    for share in shares:
        elements += share
        if elements >= limit:
            groups.append(elements)
            elements = 0
    return [*groups, elements] if elements else groups

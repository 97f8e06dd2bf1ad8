"""One rank's view of DDP and FSDP, run on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.ledger import Ledger
from memtrace.planning.optimizers.updates import MakeOptimizer, Updates
from memtrace.planning.recipe import Recipe
from memtrace.planning.sharding.shares import Sharding
from memtrace.record.categories import Category
from memtrace.record.units import MIB
from memtrace.simulation.mode import Simulation
from memtrace.simulation.models.quantized import quantized_layers
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.hooks import HookSet

DDP_FIRST_BUCKET = MIB
DDP_BUCKET = 25 * MIB
"""Bytes at which the first bucket is full, and all others. Source: torch.nn.parallel.DistributedDataParallel,
`bucket_cap_mb`, and `compute_bucket_assignment_by_size` in torch/csrc/distributed/c10d/reducer.cpp."""


class ShardedUpdates(Updates, Engine):
    """Updates that hold memory of their own: for attribution they are the engine."""

    name = "simulated engine"
    _ledger: Ledger | None = None

    def claim(self, ledger: Ledger) -> None:
        """Remembers the ledger for what comes within a step."""
        self._ledger = ledger

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether this is the optimizer that is stepped here."""
        return optimizer is self.optimizer

    def note(self, tensor: torch.Tensor, category: Category, component: str = "") -> torch.Tensor:
        """Claims a tensor that was just made; returns it."""
        if self._ledger is not None:
            self._ledger.claim(tensor, category, component)
        return tensor


class DdpUpdates(ShardedUpdates):
    """DistributedDataParallel: buckets that hold a second copy of all gradients, or the gradients themselves.

    Its reducer is C++ that reads memory, so that the real one cannot run here. Buckets live as long as the wrapper, and
    are filled with the last micro batch (`no_sync` before that, as Trainer does).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, *, gradients_are_views: bool
    ) -> None:
        super().__init__(parameters, make_optimizer)
        self._buckets: list[torch.Tensor] = []
        self._views: dict[nn.Parameter, torch.Tensor] = {}
        """Where each gradient lies in its bucket, where gradients are views."""
        self._reduces = True
        self._hooks = HookSet()
        for bucket in bucket_parameters(parameters):
            sizes = [parameter.numel() for parameter in bucket]
            self._buckets.append(torch.empty(sum(sizes), dtype=bucket[0].dtype, device=DEVICE))
            if gradients_are_views:
                parts = torch.split(self._buckets[-1], sizes)
                self._views |= {
                    parameter: part.view_as(parameter) for parameter, part in zip(bucket, parts, strict=True)
                }
        self._hooks.after_gradient(self._views, self._move)

    def micro_batch_begins(self, *, last: bool) -> None:
        """Fills the buckets with the last micro batch."""
        self._reduces = last

    def claim(self, ledger: Ledger) -> None:
        """Claims the buckets."""
        super().claim(ledger)
        for bucket in self._buckets:
            if self._views:
                ledger.claim(bucket, Category.GRADIENTS)
            else:
                ledger.claim(bucket, Category.COMM_BUFFERS, "bucket")

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()

    def _move(self, parameter: torch.Tensor) -> None:
        """Puts a gradient into its bucket, and the view of it in its place."""
        if self._reduces and parameter.grad is not None:
            assert isinstance(parameter, nn.Parameter)
            view = self._views[parameter]
            view.copy_(parameter.grad)
            parameter.grad = view


class OffloadedUpdates(Updates):
    """FSDP2 with `CPUOffloadPolicy`: shards, states and reduced gradients are the host's, and so is the step."""

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, simulation: Simulation) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(parameters, make_optimizer)
        self._simulation = simulation
        self._hooks = HookSet()
        self.offload(model)
        self._hooks.after_gradient(parameters, self._has_gradient)

    def offload(self, model: nn.Module) -> None:
        """Moves the shards of a model to the host."""
        for parameter in model.parameters():
            self._simulation.to_host(_local(parameter))

    def step(self) -> None:
        """Updates the shards, on the host."""
        with self._simulation.on_host():
            self.optimizer.step()

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._simulation.to_host(_local(parameter.grad))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bucket_parameters(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields the parameters of each bucket, in the order in which their gradients come: the last ones first."""
    bucket: list[nn.Parameter] = []
    size, limit = 0, DDP_FIRST_BUCKET
    for parameter in reversed(parameters):
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= limit:
            yield bucket
            bucket, size, limit = [], 0, DDP_BUCKET
    if bucket:
        yield bucket


def fully_sharded(model: nn.Module, recipe: Recipe, sharding: Sharding, *, trained: bool = True) -> nn.Module:
    """Shards the model with FSDP2, layer by layer, as one rank of fake ones.

    Weights in float32 are the masters where the recipe computes in a lower type: FSDP2 gathers copies in that type. A
    model that is not trained frees all of them after its forward pass, as accelerate tells FSDP2 to.
    """
    mesh = init_device_mesh(DEVICE.type, (sharding.world_size,))
    policy = MixedPrecisionPolicy()
    if recipe.compute != recipe.updated:
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, recipe.compute), reduce_dtype=torch.float32)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    # torch does not free the root's weights after the forward pass unless it is told to: the backward pass begins there
    if not (trained and sharding.reshard_after_forward):
        settings["reshard_after_forward"] = not trained
    whole = {tensor for layer in quantized_layers(model) for tensor in layer.scale_tensors}
    if whole:  # torch 2.6 leaves out none
        settings["ignored_params"] = whole
    for unit in [*sharding_units(model), model]:
        fully_shard(unit, **settings)
    return model


def sharding_units(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the repeated layers of a model: the elements of its outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from sharding_units(child)

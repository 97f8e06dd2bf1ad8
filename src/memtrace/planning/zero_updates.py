"""One rank's view of DeepSpeed's ZeRO 0 to 2, run on tensors without memory.

DeepSpeed itself needs an accelerator and its own launcher; what it allocates is modelled here after version 0.19,
runtime/zero/stage_1_and_2.py. Rank 0 is planned: the last one has the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.categories import Category
from memtrace.planning.sharding import Sharding, Strategy
from memtrace.planning.updates import MakeOptimizer, Updates
from memtrace.sources.hooks import HookSet
from memtrace.sources.simulated_tensor import DEVICE

_ALIGNMENT = 2
"""Elements to which each rank's partition is padded (`nccl_start_alignment_factor`: 4 bytes of a 16-bit type)."""


class ZeroUpdates(Updates):
    """ZeRO 1 and 2: weights in one flat buffer, and float32 masters, states and gradients of one partition of it."""

    prepares_gradients = True

    def __init__(self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, sharding: Sharding) -> None:
        self._parameters = parameters
        self._sharding = sharding
        self._partitions_gradients = sharding.strategy is Strategy.ZERO2
        sizes = [parameter.numel() for parameter in parameters]
        self._share = partition_elements(sum(sizes), sharding.world_size)
        dtype = parameters[0].dtype
        self._flat = torch.empty(self._share * sharding.world_size, dtype=dtype, device=DEVICE)
        ends = chain([0], accumulate(sizes))
        self._mine: dict[nn.Parameter, None] = {}
        """Parameters of which at least a part lies in this rank's partition."""
        for parameter, (begin, end) in zip(parameters, pairwise(ends), strict=True):
            parameter.data = self._flat[begin:end].view_as(parameter)
            if begin < self._share:
                self._mine[parameter] = None
        self._master = self._flat[: self._share].float().requires_grad_()
        self.optimizer = make_optimizer([self._master])
        self._buckets: list[torch.Tensor] = []
        self._summed: torch.Tensor | None = None
        """ZeRO 2: this rank's gradients of the micro batches before this one."""
        self._current: torch.Tensor | None = None
        """ZeRO 2: this rank's gradients of this micro batch."""
        self._ledger: Ledger | None = None
        self._hooks = HookSet()
        self._hooks.after_gradient(parameters, self._reduce)

    def claim(self, ledger: Ledger) -> None:
        """Claims the partition of the masters and remembers the ledger for what comes within a step."""
        ledger.claim(self._master, Category.MASTER_WEIGHTS)
        self._ledger = ledger

    def micro_batch_begins(self, *, last: bool) -> None:
        """Keeps the gradients so far apart from those to come."""
        if self._partitions_gradients:
            self._buckets.clear()
            if self._summed is None:
                self._summed, self._current = self._current, None
            elif self._current is not None:
                self._summed.add_(self._current)
                self._current = None

    def step(self) -> None:
        """Converts this rank's gradients to float32 and updates its partition."""
        with torch.no_grad():
            flat = torch.zeros(self._share, dtype=self._flat.dtype, device=DEVICE)
            gradient = flat.float()
            del flat
            self._buckets.clear()
            self._summed = self._current = None
            for parameter in self._parameters:
                parameter.grad = None
            self._master.grad = gradient
            del gradient
        self.optimizer.step()
        with torch.no_grad():
            self._master.grad = None
            self._flat[: self._share].copy_(self._master)

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()

    def _reduce(self, parameter: torch.Tensor) -> None:
        """Copies a gradient into the bucket; ZeRO 2 keeps it only where it is in this rank's partition."""
        if not self._buckets:
            for _ in range(2 if self._sharding.overlap_comm else 1):
                bucket = torch.empty(self._sharding.reduce_bucket, dtype=self._flat.dtype, device=DEVICE)
                self._buckets.append(bucket)
                self._note(bucket, Category.COMM_BUFFERS, "reduce")
        if not self._partitions_gradients:
            return
        if parameter in self._mine and self._current is None:
            elements = sum(mine.numel() for mine in self._mine)
            self._current = torch.empty(elements, dtype=self._flat.dtype, device=DEVICE)
            self._note(self._current, Category.GRADIENTS, "")
        parameter.grad = None

    def _note(self, tensor: torch.Tensor, category: Category, component: str) -> None:
        if self._ledger is not None:
            self._ledger.claim(tensor, category, component)


def partition_elements(elements: int, world_size: int) -> int:
    """Returns the elements of one rank's partition of a flat buffer, padded as DeepSpeed pads it."""
    unit = _ALIGNMENT * world_size
    return -(-elements // unit) * unit // world_size

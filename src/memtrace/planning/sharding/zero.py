"""One rank's view of DeepSpeed's ZeRO 0 to 2, run on tensors without memory.

DeepSpeed needs an accelerator and its own launcher; what it allocates is modelled here after version 0.19,
runtime/zero/stage_1_and_2.py and, for stage 0, runtime/fp16/unfused_optimizer.py. One parameter group is assumed:
Trainer's two (with and without weight decay) are padded apart, by some elements a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.planning.optimizers.updates import MakeOptimizer, MasterCopies
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.planning.sharding.updates import ShardedUpdates
from memtrace.record.categories import Category
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.hooks import HookSet

Item = TypeVar("Item")

OnHost = Callable[[], AbstractContextManager[object]]
"""Returns a context in which new tensors lie in the memory of the host."""

_ALIGNMENT = 2
"""Elements to which each rank's partition is padded (`nccl_start_alignment_factor`: 4 bytes of a 16-bit type)."""


class Zero0Updates(MasterCopies, ShardedUpdates):
    """Whole float32 masters on each rank; gradients are reduced through flat copies of at most one bucket."""

    prepares_gradients = True

    def __init__(self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, sharding: Sharding) -> None:
        super().__init__(parameters, make_optimizer, torch.float32)
        self._sharding = sharding
        self._last = True

    def claim(self, ledger: Ledger) -> None:
        """Claims the masters."""
        super().claim(ledger)
        for master in self._masters:
            ledger.claim(master, Category.MASTER_WEIGHTS)

    def micro_batch_begins(self, *, last: bool) -> None:
        """Gradients are reduced with the last micro batch."""
        self._last = last

    def micro_batch_ends(self) -> None:
        """Reduces the gradients in flat copies."""
        if not self._last or self._sharding.world_size == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        for bucket in filled_buckets(gradients, self._sharding.reduce_bucket):
            self.note(torch.cat([gradient.view(-1) for gradient in bucket]), Category.COMM_BUFFERS, "reduce")


class ZeroUpdates(ShardedUpdates):
    """ZeRO 1 and 2: weights in one flat buffer, and float32 masters, states and gradients of one partition of it."""

    prepares_gradients = True

    def __init__(
        self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, sharding: Sharding, host: OnHost
    ) -> None:
        self._parameters = parameters
        self._sharding = sharding
        self._offloads = sharding.offload is not Offload.NONE
        self._host = host if self._offloads else nullcontext
        """Where masters, states and summed gradients are made."""
        self._partitions_gradients = sharding.strategy is Strategy.ZERO2
        sizes = [parameter.numel() for parameter in parameters]
        self._share = partition_elements(sum(sizes), sharding.world_size)
        self._flat = torch.empty(self._share * sharding.world_size, dtype=parameters[0].dtype, device=DEVICE)
        ends = chain([0], accumulate(sizes))
        self._bounds = dict(zip(parameters, pairwise(ends), strict=True))
        """Where each parameter lies in the flat buffer."""
        for parameter, (begin, end) in self._bounds.items():
            parameter.data = self._flat[begin:end].view_as(parameter)
        first = sharding.rank * self._share
        self._partition = (first, first + self._share)
        self._mine = {p: None for p, (begin, end) in self._bounds.items() if self._within(begin, end) is not None}
        """Parameters of which at least a part lies in this rank's partition."""
        with self._host():
            self._master = self._flat[first : first + self._share].to(torch.float32, copy=True).requires_grad_()
        self._staged: list[torch.Tensor] = []
        """What offloading keeps besides: of the host, then of the device."""
        self._stages: torch.Tensor | None = None
        if self._offloads:
            self._offload(max(sizes))
        self.optimizer = make_optimizer([self._master])
        self._buckets: list[torch.Tensor] = []
        self._waiting: list[nn.Parameter] = []
        """Parameters whose gradients are in the bucket and not reduced yet."""
        self._filled = 0
        self._kept: torch.Tensor | None = None
        """This rank's reduced gradients of this micro batch, whole parameters one after the other."""
        self._kept_elements = 0
        self._summed: list[torch.Tensor] = []
        """This rank's gradients, summed over the micro batches that are over."""
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        """Gradients of earlier micro batches, on the host."""
        self._norm: torch.Tensor | None = None
        self._last = True
        self._hooks = HookSet()
        self._hooks.after_gradient(parameters, self._has_gradient)

    def _offload(self, largest: int) -> None:
        """Makes what stands between device and host: 16-bit weights and the largest gradient on both sides.

        Source: `param_buffer_of_bit16_for_cpu_offload_groups`, `temp_grad_buffer_for_..._offload`.
        """
        dtype = self._flat.dtype
        with self._host():
            self._master.grad = torch.empty_like(self._master)
            self._staged = [torch.empty(size, dtype=dtype, device=DEVICE) for size in (self._share, largest)]
        self._stages = torch.empty(largest, dtype=dtype, device=DEVICE)

    def claim(self, ledger: Ledger) -> None:
        """Claims masters, the norm that DeepSpeed keeps, and the buffer that gradients are offloaded through."""
        super().claim(ledger)
        ledger.claim(self._master, Category.MASTER_WEIGHTS)
        if self._stages is not None:
            ledger.claim(self._stages, Category.COMM_BUFFERS, "offload")
        if self._norm is not None:
            ledger.claim(self._norm, Category.BUFFERS, "grad_norm")

    def micro_batch_begins(self, *, last: bool) -> None:
        """Stage 1 reduces with the last micro batch only."""
        self._last = last

    def micro_batch_ends(self) -> None:
        """Reduces what is left, and adds this rank's gradients up."""
        if not (self._partitions_gradients or self._last):
            return
        if not self._reduces_in_hooks:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    self._put(parameter)
        with torch.no_grad():
            self._reduce()
        if self._offloads:
            self._buckets.clear()
            self.zero_grad()
            return
        with torch.no_grad():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._mine]
            for total, gradient in zip(self._summed, gradients, strict=False):
                total.add_(gradient)
            self._summed = self._summed or gradients
        self._buckets.clear()
        self._kept = None
        self.zero_grad()

    def step(self) -> None:
        """Converts this rank's gradients to float32 and updates its partition."""
        if self._offloads:
            with self._host():
                self.optimizer.step()
            with torch.no_grad():
                self._flat[slice(*self._partition)].copy_(self._master)
            return
        with torch.no_grad():
            parts = list(self._parts_of_partition())
            norm = gradient_norm(parts).float()
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            del parts
            gradient = flat.to(torch.float32)
            del flat
            self._summed = []
            self._master.grad = gradient
            del gradient
            self._norm = self.note(norm, Category.BUFFERS, "grad_norm")
        self.optimizer.step()
        with torch.no_grad():
            self._master.grad = None
            self._flat[slice(*self._partition)].copy_(self._master)

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()

    @property
    def _reduces_in_hooks(self) -> bool:
        return self._partitions_gradients or (self._sharding.overlap_comm and self._last)

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        """Makes the buckets with the first gradient of a backward pass, and puts the gradient in."""
        if not self._buckets:
            for _ in range(2 if self._sharding.overlap_comm else 1):
                bucket = torch.empty(self._sharding.reduce_bucket, dtype=self._flat.dtype, device=DEVICE)
                self._buckets.append(self.note(bucket, Category.COMM_BUFFERS, "reduce"))
        if self._reduces_in_hooks:
            assert isinstance(parameter, nn.Parameter)
            self._put(parameter)

    def _put(self, parameter: nn.Parameter) -> None:
        """Copies a gradient into the bucket; one that is larger than the bucket stays where it is."""
        assert parameter.grad is not None
        size, limit = parameter.numel(), self._sharding.reduce_bucket
        with torch.no_grad():
            if self._filled + size > limit:
                self._reduce()
            if size <= limit:
                place = self._buckets[0][self._filled : self._filled + size].view_as(parameter)
                place.copy_(parameter.grad)
                parameter.grad = place
        self._waiting.append(parameter)
        self._filled += size

    def _reduce(self) -> None:
        """Reduces the bucket; each rank keeps what lies in its partition, ZeRO 2 drops the rest."""
        segments = self._segments()
        if len(segments) > 1:  # slices for several ranks are put together for one all-reduce
            for chunk in filled_buckets(segments, self._sharding.reduce_bucket, int):
                torch.empty(sum(chunk), dtype=self._flat.dtype, device=DEVICE)
        for parameter in self._waiting:
            if parameter in self._mine:
                self._keep(parameter)
            elif self._partitions_gradients:
                parameter.grad = None
        self._waiting, self._filled = [], 0

    def _keep(self, parameter: nn.Parameter) -> None:
        """Copies a reduced gradient out of the bucket; offloaded, to the host, with its norm taken on the way."""
        assert parameter.grad is not None
        if self._offloads:
            gradient_norm([parameter.grad])
            if not self._last and parameter not in self._sums:
                with self._host():
                    self._sums[parameter] = torch.empty_like(parameter)
            parameter.grad = None
            return
        if self._kept is None:
            elements = sum(mine.numel() for mine in self._mine)
            kept = torch.empty(elements, dtype=self._flat.dtype, device=DEVICE)
            self._kept, self._kept_elements = self.note(kept, Category.GRADIENTS), 0
        end = self._kept_elements + parameter.numel()
        place = self._kept[self._kept_elements : end].view_as(parameter)
        place.copy_(parameter.grad)
        parameter.grad, self._kept_elements = place, end

    def _segments(self) -> list[int]:
        """Returns the elements in the bucket by the rank that they are for; neighbours for one rank count as one."""
        segments: list[int] = []
        previous = None
        for parameter in self._waiting:
            begin, end = self._bounds[parameter]
            for rank in range(begin // self._share, (end - 1) // self._share + 1):
                elements = min(end, (rank + 1) * self._share) - max(begin, rank * self._share)
                if rank == previous:
                    segments[-1] += elements
                else:
                    segments.append(elements)
                previous = rank
        return segments

    def _within(self, begin: int, end: int) -> tuple[int, int] | None:
        """Returns what lies in this rank's partition, counted from `begin`; None where nothing does."""
        first, last = max(begin, self._partition[0]), min(end, self._partition[1])
        return (first - begin, last - begin) if first < last else None

    def _parts_of_partition(self) -> Iterator[torch.Tensor]:
        """Yields the gradients of this rank's partition, one after the other, and the padding."""
        missing = self._share
        for gradient, parameter in zip(self._summed, self._mine, strict=True):
            within = self._within(*self._bounds[parameter])
            assert within is not None
            yield gradient.view(-1)[within[0] : within[1]]
            missing -= within[1] - within[0]
        if missing:
            yield torch.zeros(missing, dtype=self._flat.dtype, device=DEVICE)


def partition_elements(elements: int, world_size: int) -> int:
    """Returns the elements of one rank's partition of a flat buffer, padded as DeepSpeed pads it."""
    unit = _ALIGNMENT * world_size
    return -(-elements // unit) * unit // world_size


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of all gradients as DeepSpeed computes it: of a float64 copy of each, one after the other."""
    norms = [torch.linalg.vector_norm(gradient.double()) for gradient in gradients]
    return torch.stack(norms).pow(2).sum().sqrt()


def filled_buckets(
    items: Sequence[Item], limit: int, size: Callable[[Any], int] = torch.Tensor.numel
) -> Iterator[list[Item]]:
    """Yields the items of each bucket; a bucket is full with the item that takes it over `limit` elements."""
    bucket: list[Item] = []
    elements = 0
    for item in items:
        bucket.append(item)
        elements += size(item)
        if elements > limit:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket

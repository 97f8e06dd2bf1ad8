"""A model of CUDA's caching allocator: what torch reserves of the device for the blocks that it gives out.

The model follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13, with what it does where the device has no more. It
leaves out private pools of CUDA graphs, and blocks that wait for another stream. One thing it cannot know is where the
device puts a new segment, which decides between free blocks of one size: new segments lie above older ones here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memtrace.allocator.blocks import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    SMALL_SIZE,
    Block,
    Device,
    Pool,
)
from memtrace.allocator.expandable_pool import ExpandablePool
from memtrace.allocator.segment_pool import PoolRules, SegmentPool
from memtrace.allocator.settings import INTERVALS, AllocatorSettings
from memtrace.errors import PlanError
from memtrace.record.units import MIB

if TYPE_CHECKING:  # torch is not needed to replay sizes
    from memtrace.sources.events import Event

_LARGE_POOL_ADDRESS = LARGE_SEGMENT * 2**22
"""Above all that a small pool can hold, and a multiple of either page."""
_STREAM_ADDRESSES = 2 * _LARGE_POOL_ADDRESS
"""Above all that the pools of a stream can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The allocator's counters after each event, in bytes."""

    requested_bytes: Sequence[int]
    allocated_bytes: Sequence[int]
    reserved_bytes: Sequence[int]

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that was reserved after any event; 0 where there was none."""
        return max(self.reserved_bytes, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The allocator's counters at one instant, in bytes."""

    requested_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0


class CachingAllocator:
    """Allocates and frees as torch does on a CUDA device, without one.

    An operation takes O(log n) steps for n free blocks, and one shift of a list of their keys.

    Args:
        settings: what PYTORCH_ALLOC_CONF says.
        limit: bytes that can be reserved in all; None for no limit. Garbage collection counts from it.
    """

    def __init__(self, settings: AllocatorSettings | None = None, *, limit: int | None = None) -> None:
        self._settings = settings or AllocatorSettings()
        self.device = Device(limit)
        self._pools: dict[int, tuple[Pool, Pool]] = {}
        """The small and the large pool of each stream: a block serves the stream that it was made for."""
        self._divisions = self._settings.divisions if any(self._settings.divisions) else None
        threshold = self._settings.garbage_collection_threshold
        self._collect_above = None if threshold is None or limit is None else int(threshold * limit)
        self._blocks: dict[Hashable, Block] = {}
        self.allocated_bytes = 0
        """Blocks in use, each as large as it is: what torch.cuda.memory_allocated() says."""
        self.requested_bytes = 0
        """Blocks in use, each as it was asked for."""
        self.peak_allocated_bytes = 0
        self.retries = 0
        """How often all that was cached was given back to the device, since it had no more (num_alloc_retries)."""
        self.highest = Level()
        """When most was reserved."""

    @property
    def reserved_bytes(self) -> int:
        """What is held of the device, in use or cached: what torch.cuda.memory_reserved() says."""
        return self.device.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that was reserved so far."""
        return self.highest.reserved_bytes

    def allocate(self, key: Hashable, nbytes: int) -> bool:
        """Allocates a block for a storage of `nbytes`, known by `key` until it is freed; no bytes take no block.

        Returns:
            Whether there was room: False only where there is a limit.

        Raises:
            PlanError: the key has a block already, or the size is negative.
        """
        if nbytes < 0 or key in self._blocks:
            raise PlanError(f"allocation of {nbytes} bytes at {key!r}: the size is negative or the block is in use")
        if nbytes == 0:
            return True
        block = self.take(nbytes)
        if block is None:
            return False
        self._blocks[key] = block
        return True

    def free(self, key: Hashable) -> None:
        """Frees the block of a key; a key without one, such as that of an empty storage, is ignored."""
        found = self._blocks.pop(key, None)
        if found is not None:
            self.give_back(found)

    def take(self, nbytes: int, stream: int = 0) -> Block | None:
        """Returns a block in use for `nbytes`, more than none; None where the device has no room for it (malloc)."""
        divisions = 0 if self._divisions is None else self._divisions[_interval(nbytes)]
        size = round_size(nbytes, divisions)
        small, large = self._pools.get(stream) or self._begin(stream)
        pool = small if size <= SMALL_SIZE else large
        block = pool.find(size)
        grown = block is None
        if block is None:
            block = self._grown(pool, size)
            if block is None:
                return None
        pool.cut(block, size)
        block.requested, block.pool = nbytes, pool
        self.requested_bytes += nbytes
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        if grown and self.device.reserved_bytes > self.highest.reserved_bytes:
            self.highest = Level(
                requested_bytes=self.requested_bytes,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.device.reserved_bytes,
            )
        return block

    def give_back(self, block: Block) -> None:
        """Frees a block that `take` has returned."""
        self.requested_bytes -= block.requested
        self.allocated_bytes -= block.size
        assert block.pool is not None
        block.pool.release(block)

    def empty_cache(self) -> None:
        """Gives back what no block in use needs, as torch.cuda.empty_cache() does."""
        for small, large in self._pools.values():
            large.empty()
            small.empty()

    def address_range(self, key: Hashable) -> range:
        """Returns the model's addresses of a block in use.

        Raises:
            KeyError: the key has none.
        """
        block = self._blocks[key]
        return range(block.address, block.address + block.size)

    def stretches(self) -> Iterator[list[Block]]:
        """Yields blocks that lie side by side, in all pools: see `Pool.stretches`."""
        for small, large in self._pools.values():
            yield from small.stretches()
            yield from large.stretches()

    def _begin(self, stream: int) -> tuple[Pool, Pool]:
        """Makes the pools of a stream, above those of the others."""
        first = len(self._pools) * _STREAM_ADDRESSES
        self._pools[stream] = found = _pools(self._settings, self.device, first)
        return found

    def _grown(self, pool: Pool, size: int) -> Block | None:
        """Returns a block of new memory, for which what is cached is given back where the device has no more."""
        if self._collect_above is not None and self.device.reserved_bytes > self._collect_above:
            target = self.device.reserved_bytes - self._collect_above
            for _, large in self._pools.values():
                target -= large.collect(target)
        block = pool.grow(size)
        if block is None and pool.release_oversized(size):
            block = pool.grow(size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = pool.grow(size)
        return block


def round_size(nbytes: int, power2_divisions: int = 0) -> int:
    """Returns what a request is rounded up to: multiples of 512 bytes, or steps between powers of two (round_size).

    Args:
        nbytes: of the request.
        power2_divisions: steps between two powers of two; 0 and 1 mean none. Small requests are not affected.
    """
    if power2_divisions > 1 and nbytes > MIN_BLOCK * power2_divisions:
        step = (1 << (nbytes.bit_length() - 1)) // power2_divisions
    else:
        step = MIN_BLOCK
    return max(MIN_BLOCK, -(-nbytes // step) * step)


def replay(events: Iterable[Event], allocator: CachingAllocator) -> Replay:
    """Lets the allocator do what happened, and returns its counters after each event.

    Args:
        events: allocations and frees in order, by address.
        allocator: with the blocks that were there before under their addresses.

    Raises:
        PlanError: an address is allocated twice without a free between.
    """
    requested: list[int] = []
    allocated: list[int] = []
    reserved: list[int] = []
    for _, address, delta in events:
        if delta > 0:
            allocator.allocate(address, delta)
        else:
            allocator.free(address)
        requested.append(allocator.requested_bytes)
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
    return Replay(requested_bytes=requested, allocated_bytes=allocated, reserved_bytes=reserved)


def _interval(nbytes: int) -> int:
    """Returns which of the intervals of roundup_power2_divisions a size is in: from 1 MiB on, one a power of two."""
    return min(max(nbytes.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)


def _pools(settings: AllocatorSettings, device: Device, first: int) -> tuple[Pool, Pool]:
    small, large = (
        PoolRules(small=small, split_limit=settings.max_split_size, rounding_limit=settings.max_non_split_rounding)
        for small in (True, False)
    )
    if settings.expandable_segments:
        return (
            ExpandablePool(small, SMALL_SEGMENT, first, device),
            ExpandablePool(large, LARGE_SEGMENT, first + _LARGE_POOL_ADDRESS, device),
        )
    return SegmentPool(small, first, device), SegmentPool(large, first + _LARGE_POOL_ADDRESS, device)

"""What the pools of the caching allocator are made of: sizes, blocks, lists of free blocks, and the device.

The rules are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of torch 2.13; names in
parentheses are theirs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Protocol

from memtrace.record.units import MIB

MIN_BLOCK = 512
"""Every size is rounded up to a multiple of this (kMinBlockSize)."""
SMALL_SIZE = MIB
"""Largest request of the small pool (kSmallSize)."""
SMALL_SEGMENT = 2 * MIB
"""What the small pool asks the device for (kSmallBuffer)."""
LARGE_SEGMENT = 20 * MIB
"""What the large pool asks the device for when the request is below `MIN_LARGE` (large_segment_size)."""
MIN_LARGE = 10 * MIB
"""Requests from here on have segments of their own size (kMinLargeAlloc), in multiples of `ROUND_LARGE`."""
ROUND_LARGE = 2 * MIB

_ADDRESS_BITS = 56
"""By how much a size is shifted in a key of `FreeBlocks`: addresses of one pool differ by less than 512 times that."""


def segment_size(size: int) -> int:
    """Returns what the device is asked for to serve a block of that size (get_allocation_size)."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE


class Block:
    """A stretch of a segment, in use or free. Made for each allocation of a replay: a plain class, to be cheap."""

    __slots__ = ("address", "after", "before", "free", "mapped", "number", "pool", "requested", "since", "size")

    def __init__(
        self, address: int, size: int, *, mapped: bool = True, before: Block | None = None, after: Block | None = None
    ) -> None:
        self.address, self.size = address, size
        self.free = True
        self.mapped = mapped
        """False for address space without memory behind it: only at the end of, or in holes of, a growing segment."""
        self.requested = 0
        """What was asked for; `size` is at least that."""
        self.before, self.after = before, after
        """Neighbours in the same segment."""
        self.since = 0
        """How often the pool had been searched when the block became free (gc_count_base)."""
        self.number = -1
        """Which block of a recording this is; -1 where nobody counts."""
        self.pool: Pool | None = None
        """Where it goes back to once it is free."""

    def split(self, size: int) -> Block:
        """Cuts the block after `size` bytes and returns the rest, which has the same state."""
        rest = Block(self.address + size, self.size - size, mapped=self.mapped, before=self, after=self.after)
        rest.free, rest.since = self.free, self.since
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb_next(self) -> None:
        """Takes over the block after this one."""
        gone = self.after
        assert gone is not None
        self.size += gone.size
        self.after = gone.after
        if gone.after is not None:
            gone.after.before = self

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.before is not None or self.after is not None


class FreeBlocks:
    """Blocks by size, then address: the smallest that fits is found by bisection.

    A key is one number, the size above the address: comparing tuples is most of a replay otherwise.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._blocks: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        """Adds a block."""
        key = (block.size << _ADDRESS_BITS) + block.address
        insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: Block) -> None:
        """Removes a block whose size has not changed since it was added."""
        key = (block.size << _ADDRESS_BITS) + block.address
        del self._keys[bisect_left(self._keys, key)]
        del self._blocks[key]

    def smallest(self, size: int) -> Block | None:
        """Returns the smallest block of that size or more; None where there is none."""
        at = bisect_left(self._keys, size << _ADDRESS_BITS)
        return self._blocks[self._keys[at]] if at < len(self._keys) else None

    def at_least(self, size: int) -> Iterator[Block]:
        """Yields the blocks of that size or more, the smallest first."""
        for at in range(bisect_left(self._keys, size << _ADDRESS_BITS), len(self._keys)):
            yield self._blocks[self._keys[at]]

    def all(self) -> list[Block]:
        """Returns all blocks, the smallest first."""
        return [self._blocks[key] for key in self._keys]


class Device:
    """What the allocator holds of a device, and may hold.

    Args:
        limit: bytes that can be reserved in all; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserved_bytes = 0
        self.calls = 0
        """How often memory was taken or given back, each of which waits for the driver."""
        self.wanted_bytes = 0
        """What would have been reserved with what was refused last."""

    def take(self, size: int) -> bool:
        """Reserves memory, where the limit allows it."""
        if self.limit is not None and self.reserved_bytes + size > self.limit:
            self.wanted_bytes = self.reserved_bytes + size
            return False
        self.reserved_bytes += size
        self.calls += 1
        return True

    def give_back(self, size: int) -> None:
        """Gives memory back."""
        self.reserved_bytes -= size
        self.calls += 1


class Pool(Protocol):
    """Gives out blocks and takes them back. A block that was found or made is in no list until it is cut."""

    def find(self, size: int) -> Block | None:
        """Returns a free block for `size` bytes, a multiple of `MIN_BLOCK`; None where the pool has none."""

    def grow(self, size: int) -> Block | None:
        """Returns a block of new memory; None where the device has none left."""

    def cut(self, block: Block, size: int) -> None:
        """Puts a block in use; the rest of it stays in the pool where it is worth keeping."""

    def release(self, block: Block) -> None:
        """Takes a block back and merges it with free neighbours."""

    def release_oversized(self, size: int) -> bool:
        """Gives blocks that may not be split back to the device, enough for a request; False where that cannot be."""

    def empty(self) -> None:
        """Gives back to the device what is not in use."""

    def collect(self, target: int) -> int:
        """Gives back at least `target` bytes of blocks not used for long, as far as there are; returns how many."""

    def stretches(self) -> Iterator[list[Block]]:
        """Yields blocks that lie side by side: of each segment, or of each free piece of one that grows."""

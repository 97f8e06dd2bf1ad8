"""What the pools of the caching allocator are made of: sizes, blocks, and lists of free blocks.

The rules are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of torch 2.13; names in
parentheses are theirs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment, in use or free."""

    address: int
    size: int
    free: bool = True
    mapped: bool = True
    """False for address space without memory behind it: only at the end of, or in holes of, a growing segment."""
    requested: int = 0
    """What was asked for; `size` is at least that."""
    before: Block | None = None
    after: Block | None = None
    """Neighbours in the same segment."""

    def split(self, size: int) -> Block:
        """Cuts the block after `size` bytes and returns the rest, which has the same state."""
        rest = Block(self.address + size, self.size - size, self.free, self.mapped, before=self, after=self.after)
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


class FreeBlocks:
    """Blocks by size, then address: the smallest that fits is found by bisection."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        """Adds a block."""
        insort(self._keys, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: Block) -> None:
        """Removes a block whose size has not changed since it was added."""
        del self._keys[bisect_left(self._keys, (block.size, block.address))]
        del self._blocks[block.address]

    def at_least(self, size: int) -> Iterator[Block]:
        """Yields the blocks of that size or more, the smallest first."""
        for at in range(bisect_left(self._keys, (size, 0)), len(self._keys)):
            yield self._blocks[self._keys[at][1]]

    def all(self) -> list[Block]:
        """Returns all blocks, the smallest first."""
        return [self._blocks[address] for _, address in self._keys]


class Pool(Protocol):
    """Gives out blocks and takes them back."""

    reserved_bytes: int

    def allocate(self, size: int) -> Block:
        """Returns a block of at least `size` bytes, a multiple of `MIN_BLOCK`."""

    def release(self, block: Block) -> None:
        """Takes a block back and merges it with free neighbours."""

    def empty(self) -> None:
        """Gives back to the device what is not in use."""

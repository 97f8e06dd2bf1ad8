"""A pool of the caching allocator whose segments each come from one cudaMalloc: torch's default."""

from __future__ import annotations

from dataclasses import dataclass

from memtrace.allocator.blocks import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    MIN_LARGE,
    ROUND_LARGE,
    SMALL_SEGMENT,
    SMALL_SIZE,
    Block,
    FreeBlocks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """What differs between the small and the large pool."""

    small: bool
    split_limit: int | None
    """Blocks from this size on are not split, and not given to smaller requests (max_split_size)."""
    rounding_limit: int
    """How much larger than a request of at least `split_limit` its block may be (max_non_split_rounding_size)."""


class SegmentPool:
    """A pool whose segments each come from one cudaMalloc and are given back whole.

    Args:
        rules: of the small or the large pool.
        first_address: where its segments begin; each lies above the one before, which is where the device puts them
            as a rule.
    """

    def __init__(self, rules: PoolRules, first_address: int) -> None:
        self.reserved_bytes = 0
        self._rules = rules
        self._next_address = first_address
        self._free = FreeBlocks()

    def allocate(self, size: int) -> Block:
        """Best fit, else a new segment; the rest of the block stays in the pool where it is worth keeping."""
        block = self._best_fit(size)
        if block is None:
            block = self._new_segment(size)
        else:
            self._free.remove(block)
        if self._worth_splitting(block, size):
            self._free.add(block.split(size))
        block.free = False
        return block

    def release(self, block: Block) -> None:
        """Merges the block with free neighbours (free_block, try_merge_blocks)."""
        block.free = True
        if block.after is not None and block.after.free:
            self._free.remove(block.after)
            block.absorb_next()
        if block.before is not None and block.before.free:
            block = block.before
            self._free.remove(block)
            block.absorb_next()
        self._free.add(block)

    def empty(self) -> None:
        """Gives back the segments that are one free block (release_blocks)."""
        for block in self._free.all():
            if block.before is None and block.after is None:
                self._free.remove(block)
                self.reserved_bytes -= block.size

    def _best_fit(self, size: int) -> Block | None:
        """Returns the smallest free block that is large enough (get_free_block); None where the rules forbid it."""
        limit = self._rules.split_limit
        block = next(self._free.at_least(size), None)
        if block is None or limit is None:
            return block
        oversized = block.size >= limit if size < limit else block.size >= size + self._rules.rounding_limit
        return None if oversized else block

    def _new_segment(self, size: int) -> Block:
        block = Block(self._next_address, self._segment_size(size))
        self._next_address += block.size
        self.reserved_bytes += block.size
        return block

    def _segment_size(self, size: int) -> int:
        """Returns what the device is asked for (get_allocation_size)."""
        if self._rules.small:
            return SMALL_SEGMENT
        return LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE

    def _worth_splitting(self, block: Block, size: int) -> bool:
        """Whether the rest of a block becomes one of its own (should_split)."""
        rest = block.size - size
        if self._rules.small:
            return rest >= MIN_BLOCK
        return rest > SMALL_SIZE and (self._rules.split_limit is None or size < self._rules.split_limit)

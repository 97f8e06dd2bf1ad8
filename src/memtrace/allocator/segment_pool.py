"""A pool of the caching allocator whose segments each come from one cudaMalloc: torch's default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memtrace.allocator.blocks import MIN_BLOCK, SMALL_SIZE, Block, Device, FreeBlocks, segment_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """What differs between the small and the large pool, and what settings change."""

    small: bool
    split_limit: int | None
    """Blocks from this size on are not split, and not given to smaller requests (max_split_size)."""
    rounding_limit: int
    """How much larger than a request of at least `split_limit` its block may be (max_non_split_rounding_size)."""

    def refuses(self, block: Block, size: int) -> bool:
        """Whether the smallest free block that is large enough is too large for a request."""
        if self.split_limit is None:
            return False
        if size < self.split_limit:
            return block.size >= self.split_limit
        return block.size >= size + self.rounding_limit


class SegmentPool:
    """A pool whose segments each come from one cudaMalloc and are given back whole.

    Args:
        rules: of the small or the large pool.
        first_address: where its segments begin; each lies above the one before, which is where the device puts them
            as a rule.
        device: what the segments come from.
    """

    def __init__(self, rules: PoolRules, first_address: int, device: Device) -> None:
        self._rules, self._device = rules, device
        self._next_address = first_address
        self._free = FreeBlocks()
        self._segments: dict[int, Block] = {}
        """The first block of each segment, by address."""
        self._searches = 0

    def find(self, size: int) -> Block | None:
        """Returns the smallest free block that is large enough (get_free_block); None where the rules forbid it."""
        self._searches += 1
        block = self._free.smallest(size)
        if block is None or self._rules.refuses(block, size):
            return None
        self._free.remove(block)
        return block

    def grow(self, size: int) -> Block | None:
        """Returns a new segment (alloc_block)."""
        length = segment_size(size)
        if not self._device.take(length):
            return None
        block = Block(self._next_address, length)
        self._segments[block.address] = block
        self._next_address += length
        return block

    def cut(self, block: Block, size: int) -> None:
        """Splits off the rest of the block where it is worth it (should_split)."""
        rest = block.size - size
        if self._rules.small:
            worth = rest >= MIN_BLOCK
        else:
            worth = rest > SMALL_SIZE and (self._rules.split_limit is None or size < self._rules.split_limit)
        if worth:
            self._add(block.split(size))
        block.free = False

    def release(self, block: Block) -> None:
        """Merges the block with free neighbours (free_block, try_merge_blocks)."""
        block.free = True
        after, before = block.after, block.before
        if after is not None and after.free:
            self._free.remove(after)
            block.absorb_next()
        if before is not None and before.free:
            block = before
            self._free.remove(block)
            block.absorb_next()
        self._add(block)

    def release_oversized(self, size: int) -> bool:
        """Gives back the smallest block above the limit that is large enough, else the largest ones until they are."""
        limit = self._rules.split_limit
        if limit is None:
            return False
        wanted = max(size, limit)
        block = self._free.smallest(wanted)
        if block is not None:
            if not block.is_split:
                self._give_back(block)
            return not block.is_split
        released = 0
        for block in reversed([*self._free.at_least(limit)]):
            if released >= wanted:
                break
            if not block.is_split:
                released += block.size
                self._give_back(block)
        return released >= wanted

    def empty(self) -> None:
        """Gives back the segments that are one free block (release_blocks)."""
        for block in self._free.all():
            if not block.is_split:
                self._give_back(block)

    def collect(self, target: int) -> int:
        """Gives back whole segments that were not used for longer than the average (garbage_collect_cached_blocks)."""
        ages = {block: self._searches - block.since for block in self._free.all() if not block.is_split}
        collected = 0
        while collected < target and ages:
            average = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= average]:
                del ages[block]
                collected += block.size
                self._give_back(block)
        return collected

    def stretches(self) -> Iterator[list[Block]]:
        """Yields the blocks of each segment: it can be given back when none of them is in use."""
        for first in self._segments.values():
            found = [first]
            while found[-1].after is not None:
                found.append(found[-1].after)
            yield found

    def _add(self, block: Block) -> None:
        block.since = self._searches
        self._free.add(block)

    def _give_back(self, block: Block) -> None:
        self._free.remove(block)
        del self._segments[block.address]
        self._device.give_back(block.size)

"""A pool of the caching allocator with one segment that grows by pages: `expandable_segments:True`."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.allocator.blocks import LARGE_SEGMENT, MIN_BLOCK, Block, Device, FreeBlocks
from memtrace.allocator.segment_pool import PoolRules

_ADDRESS_SPACE = LARGE_SEGMENT * 2**21
"""More than any device has, and a multiple of either page: how far a segment can grow."""


class ExpandablePool:
    """A segment of address space, of which pages are mapped to memory when they are needed.

    Args:
        rules: of the small or the large pool. A limit on splits bars blocks from smaller requests, as in any pool, but
            what is cut is cut to size.
        page: bytes by which it grows, 2 MiB in the small pool and 20 MiB in the large one.
        first_address: where the segment begins, a multiple of the page.
        device: what the pages come from.
    """

    def __init__(self, rules: PoolRules, page: int, first_address: int, device: Device) -> None:
        self._rules, self._device = rules, device
        self._page = page
        self._free = FreeBlocks()
        self._first = Block(first_address, _ADDRESS_SPACE, mapped=False)
        self._holes: dict[int, Block] = {}
        """Address space without memory, by address: the end of the segment, and what was given back before it."""
        self._add_hole(self._first)

    def find(self, size: int) -> Block | None:
        """Returns the smallest free block that is large enough, the block that can grow last (get_free_block).

        A block before a hole counts as large as it can grow to, so that any other that fits comes first.
        """
        best = self._free.smallest(size)
        if best is None:
            return None
        if best.after is not None and not best.after.mapped:
            for block in self._free.at_least(size):
                if block is best:
                    continue
                if _room(block) >= _room(best):
                    break
                best = block
        if self._rules.refuses(best, size):
            return None
        self._free.remove(best)
        return best

    def grow(self, size: int) -> Block | None:
        """Returns a free block of at least `size` bytes, made by mapping pages (try_allocate_expandable_block).

        What was mapped before the device had no more stays.
        """
        found = self._lowest_room(size)
        if found is not None and not found.mapped:
            found = self._map(found, min(found.size, size))
        while found is not None and found.size < size:
            hole = found.after
            assert hole is not None and not hole.mapped
            found = self._map(hole, min(hole.size, size - found.size))
        if found is not None:
            self._free.remove(found)
        return found

    def cut(self, block: Block, size: int) -> None:
        """Splits off the rest of the block, however small (should_split)."""
        if block.size - size >= MIN_BLOCK:
            self._free.add(block.split(size))
        block.free = False

    def release(self, block: Block) -> None:
        """Merges the block with free neighbours that have memory behind them."""
        block.free = True
        self._add_free(block)

    def release_oversized(self, size: int) -> bool:
        """Gives nothing back: only segments of their own are (release_available_cached_blocks)."""
        return False

    def empty(self) -> None:
        """Gives back the pages that lie whole in free blocks (unmap_block)."""
        for block in self._free.all():
            begin = -(-block.address // self._page) * self._page
            end = (block.address + block.size) // self._page * self._page
            if begin < end:
                self._free.remove(block)
                self._unmap(block, begin, end)

    def collect(self, target: int) -> int:
        """Gives nothing back: garbage collection knows segments of their own only."""
        return 0

    def stretches(self) -> Iterator[list[Block]]:
        """Yields each free piece with its neighbours that are in use: its whole pages can be given back at any time."""
        for piece in self._free.all():
            around = (piece.before, piece, piece.after)
            yield [block for block in around if block is not None and block.mapped]

    def _lowest_room(self, size: int) -> Block | None:
        """Returns where the lowest run of free blocks and holes begins that has room (find_expandable_block).

        None where the address space is used up.
        """
        for address in sorted(self._holes):
            hole = self._holes[address]
            begin = hole.before if hole.before is not None and hole.before.free else hole
            if _run(begin, size) >= size:
                return begin
        return None

    def _map(self, hole: Block, size: int) -> Block | None:
        """Puts whole pages behind the beginning of a hole; returns the free block that they are now part of.

        None where the device has not so many.
        """
        size = -(-size // self._page) * self._page
        if not self._device.take(size):
            return None
        del self._holes[hole.address]
        rest = hole.split(size) if size < hole.size else None
        hole.mapped = True
        if rest is not None:
            self._add_hole(rest)
        return self._add_free(hole)

    def _unmap(self, block: Block, begin: int, end: int) -> None:
        """Makes a hole of the pages from `begin` to `end` of a block that is in no list."""
        if begin > block.address:
            head, block = block, block.split(begin - block.address)
            self._free.add(head)
        if end < block.address + block.size:
            self._free.add(block.split(end - block.address))
        self._device.give_back(block.size)
        block.mapped = False
        self._add_hole(block)

    def _add_free(self, block: Block) -> Block:
        """Adds a free block together with its free neighbours; returns what they make up."""
        if block.after is not None and block.after.free and block.after.mapped:
            self._free.remove(block.after)
            block.absorb_next()
        if block.before is not None and block.before.free and block.before.mapped:
            block = block.before
            self._free.remove(block)
            block.absorb_next()
        self._free.add(block)
        return block

    def _add_hole(self, block: Block) -> None:
        """Adds a hole together with the holes beside it."""
        if block.after is not None and not block.after.mapped:
            del self._holes[block.after.address]
            block.absorb_next()
        if block.before is not None and not block.before.mapped:
            block = block.before
            block.absorb_next()
        self._holes[block.address] = block


def _room(block: Block) -> int:
    """Returns the size that a free block can have without a move: its own, and that of a hole after it."""
    return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)


def _run(block: Block | None, enough: int) -> int:
    """Returns the bytes of neighbouring blocks that are not in use, from this one on; stops when it is enough."""
    total = 0
    while block is not None and block.free and total < enough:
        total += block.size
        block = block.after
    return total

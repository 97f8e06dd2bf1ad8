"""A model of CUDA's caching allocator: what torch reserves of the device for the blocks that it gives out.

The model follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13 for one stream. It leaves out private pools of CUDA
graphs, garbage collection, and running out of memory. One thing it cannot know is where the device puts a new segment,
which decides between free blocks of one size: new segments lie above older ones here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from memtrace.allocator.blocks import LARGE_SEGMENT, MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE, Block, Pool
from memtrace.allocator.expandable_pool import ExpandablePool
from memtrace.allocator.segment_pool import PoolRules, SegmentPool
from memtrace.errors import PlanError
from memtrace.record.units import MIB
from memtrace.sources.events import Event

_LARGE_POOL_ADDRESS = LARGE_SEGMENT * 2**22
"""Above all that a small pool can hold, and a multiple of either page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """What PYTORCH_ALLOC_CONF can change; the defaults are torch's."""

    expandable_segments: bool = False
    """Whether each pool is one segment that grows."""
    max_split_size: int | None = None
    """Bytes from which a block is not split; None for no limit (max_split_size_mb)."""
    max_non_split_rounding: int = LARGE_SEGMENT
    """Bytes by which a block may exceed a request of at least `max_split_size` (max_non_split_rounding_mb)."""
    roundup_power2_divisions: int = 0
    """Steps between two powers of two that sizes are rounded up to; 0 rounds to multiples of 512 only."""

    def __post_init__(self) -> None:
        if self.max_split_size is not None and self.max_split_size <= LARGE_SEGMENT:
            raise PlanError(f"max_split_size must be above {LARGE_SEGMENT // MIB} MiB, got {self.max_split_size} bytes")
        if self.max_non_split_rounding < LARGE_SEGMENT:
            raise PlanError(
                f"max_non_split_rounding must be at least {LARGE_SEGMENT // MIB} MiB, "
                f"got {self.max_non_split_rounding} bytes"
            )
        if self.expandable_segments and self.max_split_size is not None:
            raise PlanError("max_split_size is not modelled together with expandable_segments: leave one of them out")
        divisions = self.roundup_power2_divisions
        if divisions < 0 or divisions & (divisions - 1):
            raise PlanError(f"roundup_power2_divisions must be 0 or a power of two, got {divisions}")


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


class CachingAllocator:
    """Allocates and frees as torch does on a CUDA device, without one.

    An operation takes O(log n) steps for n free blocks, and one shift of a list of their keys.
    """

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self._settings = settings or AllocatorSettings()
        self._small, self._large = _pools(self._settings)
        self._blocks: dict[Hashable, tuple[Pool, Block]] = {}
        self.allocated_bytes = 0
        """Blocks in use, each as large as it is: what torch.cuda.memory_allocated() says."""
        self.requested_bytes = 0
        """Blocks in use, each as it was asked for."""
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """What is held of the device, in use or cached: what torch.cuda.memory_reserved() says."""
        return self._small.reserved_bytes + self._large.reserved_bytes

    def allocate(self, key: Hashable, nbytes: int) -> None:
        """Allocates a block for a storage of `nbytes`, known by `key` until it is freed; no bytes take no block.

        Raises:
            PlanError: the key has a block already, or the size is negative.
        """
        if nbytes < 0 or key in self._blocks:
            raise PlanError(f"allocation of {nbytes} bytes at {key!r}: the size is negative or the block is in use")
        if nbytes == 0:
            return
        size = round_size(nbytes, self._settings.roundup_power2_divisions)
        pool = self._small if size <= SMALL_SIZE else self._large
        block = pool.allocate(size)
        block.requested = nbytes
        self._blocks[key] = pool, block
        self.requested_bytes += nbytes
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def free(self, key: Hashable) -> None:
        """Frees the block of a key; a key without one, such as that of an empty storage, is ignored."""
        found = self._blocks.pop(key, None)
        if found is None:
            return
        pool, block = found
        self.requested_bytes -= block.requested
        self.allocated_bytes -= block.size
        pool.release(block)

    def empty_cache(self) -> None:
        """Gives back what no block in use needs, as torch.cuda.empty_cache() does."""
        self._small.empty()
        self._large.empty()

    def address_range(self, key: Hashable) -> range:
        """Returns the model's addresses of a block in use.

        Raises:
            KeyError: the key has none.
        """
        _, block = self._blocks[key]
        return range(block.address, block.address + block.size)


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


def _pools(settings: AllocatorSettings) -> tuple[Pool, Pool]:
    if settings.expandable_segments:
        return ExpandablePool(SMALL_SEGMENT, 0), ExpandablePool(LARGE_SEGMENT, _LARGE_POOL_ADDRESS)
    rules = [
        PoolRules(small=small, split_limit=settings.max_split_size, rounding_limit=settings.max_non_split_rounding)
        for small in (True, False)
    ]
    return SegmentPool(rules[0], 0), SegmentPool(rules[1], _LARGE_POOL_ADDRESS)

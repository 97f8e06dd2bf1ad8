"""What CUDA's caching allocator says about itself now: its counters, its segments and the blocks in them.

Another allocator (`backend:cudaMallocAsync`, a pluggable one) says less, or nothing: what it refuses is None or empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, compress
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources.events import Block, StreamMemory
from memtrace.sources.recording_torch_private import list_segments

PoolId = tuple[int, int]
_LIVE_STATES = frozenset({"active_allocated", "active_awaiting_free", "active_pending_free"})
_block_fields = itemgetter("address", "requested_size", "state")


def segments(pool: PoolId | None = None, *, empty_history: bool = False) -> Sequence[Any] | None:
    """Returns the segments of all devices and their blocks, without the history where torch can leave it out.

    Neither allocates on a device nor synchronises one. A history that somebody records gets an entry `snapshot`.

    Args:
        pool: a private pool, to have its segments only. One that does not exist has none.
        empty_history: whether there is no history that torch would copy.

    Returns:
        None where the allocator does not list them, or torch not those of one pool without copying a history.
    """
    known = _parameters(torch.cuda.memory_snapshot)
    lean = "include_traces" in known
    if pool is not None and not ("mempool_id" in known and (lean or empty_history)):
        return None
    try:
        return list_segments(pool, **({"include_traces": False} if lean else {}))
    except RuntimeError:
        return None


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def counters(device_index: int) -> Mapping[str, Any]:
    """Returns `torch.cuda.memory_stats_as_nested_dict()`; empty where the allocator has no counters.

    `memory_stats()` makes a sorted dictionary of them all, and takes five times as long.
    """
    try:
        found: Mapping[str, Any] = torch.cuda.memory.memory_stats_as_nested_dict(device_index)
    except RuntimeError:
        return {}
    return found


def allowed_bytes(device_index: int) -> int | None:
    """Returns what the allocator may reserve in all; None where it is not bounded, and where torch cannot tell."""
    ask = getattr(torch.cuda.memory, "get_per_process_memory_fraction", None)
    if ask is None:
        return None
    try:
        ratio = float(ask(device_index))
    except RuntimeError:
        return None
    return int(ratio * torch.cuda.get_device_properties(device_index).total_memory) if 0 <= ratio < 1 else None


def parse_counters(
    stats: Mapping[str, Any], *, private_pool_bytes: int | None = None, allowed_bytes: int | None = None
) -> AllocatorReading | None:
    """Returns the counters in `counters()`; None where the basic ones are absent.

    Fields come and go between versions of torch: each one that is absent, or has another form, is None. So is one that
    an allocator leaves at 0 although blocks are in use.

    Args:
        stats: what `counters()` returns.
        private_pool_bytes: what `PrivatePools` says.
        allowed_bytes: what the function of that name says.
    """
    allocated, reserved = _sum(stats, "allocated_bytes"), _sum(stats, "reserved_bytes")
    if allocated is None or reserved is None:
        return None
    requested, allocations = _sum(stats, "requested_bytes"), allocations_of(stats)
    counts = not allocated or requested != 0
    return AllocatorReading(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        requested_bytes=requested if counts else None,
        peak_allocated_bytes=_sum(stats, "allocated_bytes", "peak"),
        peak_requested_bytes=_sum(stats, "requested_bytes", "peak") if counts else None,
        inactive_split_bytes=_sum(stats, "inactive_split_bytes"),
        retries=_count(stats, "num_alloc_retries"),
        ooms=_count(stats, "num_ooms"),
        allocations=allocations if allocations or not allocated else None,
        device_allocations=_count(stats, "num_device_alloc"),
        private_pool_bytes=private_pool_bytes,
        allowed_bytes=allowed_bytes,
    )


def allocations_of(stats: Mapping[str, Any]) -> int | None:
    """Returns how often memory was allocated since the process began; None where the allocator does not count it."""
    return _sum(stats, "allocation", "allocated")


def _sum(stats: Mapping[Any, Any], group: object, value: str = "current") -> int | None:
    try:
        found = stats[group]["all"][value]
    except (KeyError, TypeError, IndexError):
        return None
    return found if isinstance(found, int) else None


def _count(stats: Mapping[str, Any], name: str) -> int | None:
    found = stats.get(name)
    return found if isinstance(found, int) else None


class PoolBytes(NamedTuple):
    """What the private pools of one device hold."""

    reserved: int
    in_use: int
    """Of that in blocks that are in use, which the allocator counts as allocated."""


class PrivatePools:
    """What private pools (CUDA graphs, `MemPool`) hold of one device without using it: no other tensor can have that.

    The counters say how much is reserved; how much of it is in use, only a list of the segments says. They are listed
    when the counter has moved, which is when a graph is captured: a replayed one allocates nothing. Where torch has no
    such counter, the last list stands.
    """

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._listed: PoolBytes | None = None

    def unused_bytes(self, stats: Mapping[str, Any]) -> int | None:
        """Returns what the pools hold beyond the blocks in use in them; None where nobody tells.

        Args:
            stats: what `counters()` returns.
        """
        reserved = _private_reserved(stats)
        if reserved and (self._listed is None or reserved != self._listed.reserved):
            by_pool = [segments(pool) for pool in _pools(stats)]
            self.listed(segments() if None in by_pool else [*chain.from_iterable(found or () for found in by_pool)])
            assert self._listed is not None
            self._listed = self._listed._replace(reserved=reserved)
        if self._listed is None:
            return reserved
        if reserved is None:
            return self._listed.reserved - self._listed.in_use
        return max(0, reserved - self._listed.in_use) if reserved else 0

    def listed(self, found: object) -> None:
        """Takes in a list of segments."""
        reserved = in_use = 0
        for segment in found if isinstance(found, Sequence) else ():
            if is_private(segment) and segment.get("device", self._device_index) == self._device_index:
                total, used = segment.get("total_size"), segment.get("allocated_size")
                if isinstance(total, int) and isinstance(used, int):
                    reserved, in_use = reserved + total, in_use + used
        self._listed = PoolBytes(reserved, in_use)


def is_private(segment: object) -> bool:
    """Returns whether a segment belongs to a private pool, from which nobody else gets memory."""
    pool = segment.get("segment_pool_id") if isinstance(segment, Mapping) else None
    return isinstance(pool, Sequence) and not isinstance(pool, str) and any(part != 0 for part in pool)


def _private_reserved(stats: Mapping[str, Any]) -> int | None:
    by_pool = stats.get("reserved_bytes_by_private_pools")
    if not isinstance(by_pool, Mapping):
        return None
    return sum(_sum(by_pool, pool) or 0 for pool in by_pool)


def _pools(stats: Mapping[str, Any]) -> Iterator[PoolId]:
    by_pool = stats["reserved_bytes_by_private_pools"]
    return (pool for pool in by_pool if _sum(by_pool, pool))


def live_blocks(found: object, device_index: int) -> Sequence[Block]:
    """Returns the blocks in use on one device, with their requested sizes, from a list of segments.

    Blocks that wait for another stream before they can be reused are in use.
    """
    try:
        rows = [
            _block_fields(block)
            for segment in found  # type: ignore[attr-defined]
            if segment["device"] == device_index
            for block in segment["blocks"]
        ]
        live = [*compress(rows, [state in _LIVE_STATES for _, _, state in rows])]
    except (KeyError, TypeError, IndexError):
        return [*_lenient_blocks(found, device_index)]
    if {type(part) for row in live for part in row[:2]} - {int}:
        return [*_lenient_blocks(found, device_index)]
    return [Block(address, size) for address, size, _ in live]


def stream_memory(found: object, device_index: int) -> Sequence[StreamMemory]:
    """Returns which memory of a device is for which stream, by address, from a list of segments.

    Empty where all of it is for one stream, and where torch does not say.
    """
    streams: list[StreamMemory] = []
    for segment in found if isinstance(found, Sequence) else ():
        if isinstance(segment, Mapping) and segment.get("device", device_index) == device_index:
            begin, size, stream = segment.get("address"), segment.get("total_size"), segment.get("stream")
            if isinstance(begin, int) and isinstance(size, int) and isinstance(stream, int):
                streams.append(StreamMemory(begin, begin + size, stream))
    return sorted(streams) if len({one.stream for one in streams}) > 1 else ()


def _lenient_blocks(found: object, device_index: int) -> Iterator[Block]:
    """Yields the blocks in use of a list in another form: older versions of torch have fewer fields."""
    for segment in found if isinstance(found, Sequence) else ():
        if not isinstance(segment, Mapping) or segment.get("device", device_index) != device_index:
            continue
        address, blocks = segment.get("address", 0), segment.get("blocks")
        for block in blocks if isinstance(blocks, Sequence) else ():
            if not isinstance(block, Mapping):
                continue
            size, at, state = block.get("size", 0), block.get("address", address), block.get("state")
            if not (isinstance(size, int) and isinstance(at, int)):
                continue
            requested = block.get("requested_size", size)
            if isinstance(state, str) and state in _LIVE_STATES and isinstance(requested, int):
                yield Block(at, requested)
            address = at + size

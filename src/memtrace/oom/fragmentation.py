"""How the caching allocator's free memory is cut up, and what pins it, from its list of segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memtrace.record.breakdown import EntryKey
from memtrace.record.oom.report import Fragmentation, PinnedSegment
from memtrace.sources.cuda.allocator import is_private

MAX_PINNED = 5
MAX_PINS = 3


def parse_fragmentation(
    segments: object, device_index: int, known: Mapping[int, EntryKey] | None = None
) -> Fragmentation:
    """Returns the free pieces in the segments of one device, without private pools: no request is served from those.

    Args:
        segments: what `torch.cuda.memory_snapshot()` returns. Fields come and go between versions of torch: what has
            not the expected form is skipped.
        device_index: the device; a segment that does not name one counts.
        known: what the blocks in use are for, by address.
    """
    free: list[int] = []
    pinned: list[PinnedSegment] = []
    count, expandable = 0, False
    for segment in _mappings(segments):
        if segment.get("device", device_index) != device_index or is_private(segment):
            continue
        count += 1
        grows = segment.get("is_expandable") is True
        expandable = expandable or grows
        blocks = [block for block in _mappings(segment.get("blocks")) if isinstance(block.get("size"), int)]
        pieces = [block["size"] for block in blocks if block.get("state") == "inactive"]
        free += pieces
        if pieces and not grows:
            pinned += _pinned(blocks, sum(pieces), known or {})
    pinned.sort(key=lambda segment: -segment.free_bytes)
    return Fragmentation(
        free_bytes=sum(free),
        largest_free_bytes=max(free, default=0),
        segments=count,
        expandable=expandable,
        pinned=tuple(pinned[:MAX_PINNED]),
    )


def _pinned(
    blocks: Sequence[Mapping[str, Any]], free_bytes: int, known: Mapping[int, EntryKey]
) -> Iterator[PinnedSegment]:
    used = sorted((block for block in blocks if block.get("state") != "inactive"), key=lambda block: block["size"])
    if used:
        named = ((block["size"], known.get(block.get("address", -1))) for block in used)
        yield PinnedSegment(
            size=sum(block["size"] for block in blocks),
            free_bytes=free_bytes,
            pinned_by=len(used),
            pins=tuple((size, key) for size, key in named if key is not None)[:MAX_PINS],
        )


def _mappings(items: object) -> Iterator[Mapping[str, Any]]:
    for item in items if isinstance(items, Sequence) else ():
        if isinstance(item, Mapping):
            yield item

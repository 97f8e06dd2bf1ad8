"""How the caching allocator's free memory is cut up, from its list of segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memtrace.record.oom_report import Fragmentation
from memtrace.sources.cuda.allocator import is_private


def parse_fragmentation(segments: object, device_index: int) -> Fragmentation:
    """Returns the free pieces in the segments of one device, without private pools: no request is served from those.

    Args:
        segments: what `torch.cuda.memory_snapshot()` returns. Fields come and go between versions of torch: what has
            not the expected form is skipped.
        device_index: the device; a segment that does not name one counts.
    """
    free: list[int] = []
    count, expandable = 0, False
    for segment in _mappings(segments):
        if segment.get("device", device_index) != device_index or is_private(segment):
            continue
        count += 1
        expandable = expandable or segment.get("is_expandable") is True
        for block in _mappings(segment.get("blocks")):
            size = block.get("size")
            if block.get("state") == "inactive" and isinstance(size, int):
                free.append(size)
    return Fragmentation(
        free_bytes=sum(free), largest_free_bytes=max(free, default=0), segments=count, expandable=expandable
    )


def _mappings(items: object) -> Iterator[Mapping[str, Any]]:
    for item in items if isinstance(items, Sequence) else ():
        if isinstance(item, Mapping):
            yield item

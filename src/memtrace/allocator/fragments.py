"""Fragments: memory that is reserved and free, and the blocks beside it that keep it from being given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memtrace.allocator.blocks import Block
from memtrace.allocator.caching_allocator import CachingAllocator
from memtrace.allocator.recording import AllocatorRecording

MAX_PINS = 4
"""Blocks that are named of each fragment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A block in use that keeps a fragment from being given back."""

    nbytes: int
    name: str
    """What it is for: a category or the innermost frame of its stack; empty where that is not known."""
    address: int | None
    """Where it lay in the recorded process; None where nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Memory that is reserved, free, and held back by blocks beside it. Bytes."""

    size: int
    """Of the segment, or of the free piece and its neighbours where segments grow."""
    free_bytes: int
    pins: Sequence[Pin]
    """Blocks in use there, the smallest first, `MAX_PINS` at most."""
    pinned_by: int
    """How many there are."""
    pinned_bytes: int
    """What they hold together."""


def fragments_of(recording: AllocatorRecording, allocator: CachingAllocator) -> Iterator[Fragment]:
    """Yields what is free and held back in an allocator that has replayed a recording up to some moment."""
    for stretch in allocator.stretches():
        used = sorted((block for block in stretch if not block.free), key=lambda block: block.size)
        free = sum(block.size for block in stretch if block.free)
        if used and free:
            yield Fragment(
                size=sum(block.size for block in stretch),
                free_bytes=free,
                pins=[_pin(recording, block) for block in used[:MAX_PINS]],
                pinned_by=len(used),
                pinned_bytes=sum(block.size for block in used),
            )


def _pin(recording: AllocatorRecording, block: Block) -> Pin:
    number = block.number
    return Pin(
        nbytes=block.requested,
        name=recording.name(number) if number >= 0 else "",
        address=recording.addresses[number] if number >= 0 and recording.addresses else None,
    )

"""Histories of an allocator, made to show one thing each."""

from __future__ import annotations

from collections.abc import Sequence

from memtrace.record.allocator_recording import AllocatorRecording
from memtrace.record.units import MIB

Step = int | str
"""Bytes that are allocated, or `-N`: the block of that number is freed."""


def recording(*events: int, **facts: object) -> AllocatorRecording:
    """A recording that begins with the process; above 0 an allocation, below 0 the free of a block."""
    return AllocatorRecording(events=events, **{"sizes_at_begin": (), "from_the_start": True} | facts)


def one_after_the_other(sizes: Sequence[int]) -> list[int]:
    """Each block is freed before the next one comes."""
    return [event for number, size in enumerate(sizes) for event in (size, -number - 1)]


def longer_and_longer(lengths: Sequence[int], layers: int = 24) -> list[int]:
    """Steps of a model with 7.5 GiB of weights whose texts have other lengths in each: what cuts memory up.

    Each layer keeps three tensors until its backward pass, and has a temporary one.
    """
    events = [48 * MIB] * 160
    blocks = len(events)
    for length in lengths:
        saved = []
        for _ in range(layers):
            for width in (2, 3, 8):
                events.append(length * width * 4096)
                saved.append(blocks)
                blocks += 1
            events += [length * 8 * 4096, -blocks - 1]
            blocks += 1
        events += [-number - 1 for number in reversed(saved)]
    return events


FRAGMENTING = (700, 760, 820, 900, 980, 1050, 1100, 1200)
"""Lengths that grow: no cached piece is large enough for the next step."""

"""Histories of an allocator, made to show one thing each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from memtrace.allocator.recording import AllocatorRecording
from memtrace.allocator.settings import AllocatorSettings
from memtrace.allocator.what_if import replayed
from memtrace.record.units import GIB, MIB


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


def second_step() -> AllocatorRecording:
    """A fine-tune from its start until it fails in its second step, on a device that has 11.5 GiB for it.

    AdamW makes its state at the end of the first step, where the allocator puts it into the memory that the
    activations have left. A tensor of it takes more than half of such a segment, and the rest is of no use to anybody.
    """
    kinds = (
        "weights trainable bfloat16",
        "activations",
        "optimizer_state exp_avg float32",
        "optimizer_state exp_avg_sq float32",
    )
    events, labels = [64 * MIB] * 64, [0] * 64
    for _ in range(2):
        saved = range(len(labels), len(labels) + 40)
        events += [100 * MIB] * 40
        labels += [1] * 40
        events += [-number - 1 for number in reversed(saved)]
        if len(labels) == 104:
            events += [60 * MIB] * 40
            labels += [2, 3] * 20
    whole = AllocatorRecording(sizes_at_begin=(), events=events, limit_bytes=11 * GIB + GIB // 2)
    end = replayed(whole, AllocatorSettings(), whole.limit_bytes).stopped_at
    assert end is not None
    sizes = [event for event in events[:end] if event > 0]
    addresses = [*accumulate(sizes, initial=0x7F0000000000)][:-1]
    return replace(
        whole,
        events=events[:end],
        failed_bytes=events[end],
        torch="2.13.0",
        origin="a fine-tune",
        from_the_start=True,
        names=kinds,
        labels=labels[: len(sizes)],
        addresses=addresses,
    )

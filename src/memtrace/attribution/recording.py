"""A traced step as a recording of the allocator: what it was asked for, and what each block was for."""

from __future__ import annotations

from array import array

import torch

from memtrace.allocator.recording import AllocatorRecording, label_columns
from memtrace.attribution.timeline import Lifetime, StepMarks, Timeline
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.sources.cuda.settings_variable import configured_settings

MAX_EVENTS = 500_000
"""Allocations and frees of a step that is recorded: some 12 MB of memory, and a file of some 2 MB."""


def step_recording(timeline: Timeline, marks: StepMarks, record: StepRecord) -> AllocatorRecording | None:
    """Returns what the allocator was asked for in a window; None where that is more than `MAX_EVENTS`.

    Takes about 0.5 us a block. Blocks that are there at the peak say their category; others only where they are tagged.

    Args:
        timeline: of the window.
        marks: of its step.
        record: of its step, for what was read of allocator and device at its end.
    """
    if len(timeline.change_ns) > MAX_EVENTS:
        return None
    before = sorted((life for life in timeline.lifetimes if life.begin < 0), key=lambda life: life.address)
    made = sorted((life for life in timeline.lifetimes if life.begin >= 0), key=lambda life: life.begin)
    events = array("q", bytes(8 * len(timeline.change_ns)))
    for number, life in enumerate((*before, *made)):
        if life.begin >= 0:
            events[life.begin] = life.nbytes
        if life.end is not None:
            events[life.end] = -number - 1
    blocks = [*before, *made]
    names, labels = label_columns(_labels(timeline, marks, blocks))
    allocator, device = record.allocator, record.device_memory
    reach = None if device is None else device.free_and_reserved_bytes
    allowed = None if allocator is None else allocator.allowed_bytes
    unusable = 0 if allocator is None else allocator.private_pool_bytes or 0
    bounds = [bound - unusable for bound in (reach, allowed) if bound is not None]
    return AllocatorRecording(
        sizes_at_begin=array("q", (life.nbytes for life in before)),
        events=events,
        settings=configured_settings(str(torch.__version__)),
        torch=str(torch.__version__),
        origin=f"step {record.step} of rank {record.rank} on {record.device}",
        rank=record.rank,
        limit_bytes=min(bounds, default=None),
        peak_reserved_bytes=None if allocator is None else allocator.reserved_bytes - unusable,
        addresses=array("q", (life.address for life in blocks)),
        names=names,
        labels=labels,
    )


def _labels(timeline: Timeline, marks: StepMarks, blocks: list[Lifetime]) -> list[str]:
    """Returns what each block is for, as category, component and element type; empty where that is not told."""
    peak = timeline.positions(marks)[Moment.PEAK]
    entries = timeline.entries(marks, peak)
    found = []
    for life in blocks:
        if life.begin < peak and (life.end is None or life.end >= peak):
            key: tuple[str, ...] = entries(life)
        else:
            key = () if life.tag is None else life.tag
        found.append(" ".join(part for part in key if part))
    return found

"""Step records made for tests of the risk: sizes are bytes, all steps are on a GPU of 1000 bytes unless told."""

from __future__ import annotations

from dataclasses import replace

from memtrace.record.breakdown import AllocatorReading, BatchShape, Breakdown, DeviceReading, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment, Phase


def breakdown(moment: Moment, sizes: dict[Category, int], *, phase: Phase = Phase.BACKWARD) -> Breakdown:
    """Returns a breakdown with one entry a category."""
    entries = {
        EntryKey(category, str(phase) if category is Category.TEMPORARIES else "", ""): size
        for category, size in sizes.items()
    }
    return Breakdown(moment=moment, entries=entries, allocated_bytes=sum(sizes.values()))


def batch(samples: int, positions: int) -> BatchShape:
    """Returns a batch of one micro batch."""
    tokens = samples * positions
    return BatchShape(shape=(samples, positions), tokens=tokens, largest_micro_batch_tokens=tokens)


def traced(step: int, *, positions: int = 10, leaked: int = 0, weights: int = 100, per_token: int = 4) -> StepRecord:
    """Returns a traced step on a GPU that takes `per_token` bytes a token and keeps `leaked` bytes."""
    end = {Category.WEIGHTS: weights, Category.UNATTRIBUTED: leaked}
    peak = {**end, Category.ACTIVATIONS: per_token * 2 * positions}
    return StepRecord(
        step=step,
        rank=0,
        device="cuda:0",
        traced=True,
        unix_seconds=1000.0 + 2 * step,
        self_seconds=0.0,
        batch=batch(2, positions),
        moments={Moment.STEP_END: breakdown(Moment.STEP_END, end), Moment.PEAK: breakdown(Moment.PEAK, peak)},
        allocator=AllocatorReading(allocated_bytes=weights + leaked, reserved_bytes=1000),
    )


def on_cpu(record: StepRecord, *, process: int) -> StepRecord:
    """Returns the step as if on a CPU, where there is no allocator to ask, but the process."""
    return replace(record, device="cpu", allocator=None, device_memory=DeviceReading(process_bytes=process))


def counted(
    step: int, *, positions: int, mark: int, rose: bool = False, allocated: int = 100, weights: int = 100
) -> StepRecord:
    """Returns a counted step on a GPU after which the allocator's high-water mark is `mark`; its peak if that rose."""
    peak = breakdown(Moment.PEAK, {Category.WEIGHTS: weights, Category.ACTIVATIONS: mark - weights})
    end = breakdown(Moment.STEP_END, {Category.WEIGHTS: weights})
    return StepRecord(
        step=step,
        rank=0,
        device="cuda:0",
        traced=False,
        unix_seconds=1000.0 + 2 * step,
        self_seconds=0.0,
        batch=batch(2, positions),
        moments={
            Moment.STEP_END: Breakdown(
                moment=Moment.STEP_END, entries=end.entries, allocated_bytes=allocated, estimated=True
            ),
            Moment.PEAK: replace(peak, allocated_bytes=mark if rose else None, estimated=True),
        },
        allocator=AllocatorReading(
            allocated_bytes=allocated, reserved_bytes=400, requested_bytes=allocated, peak_allocated_bytes=mark
        ),
    )

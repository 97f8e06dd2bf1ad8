"""The warning of a run that is about to run out of memory, in words."""

from __future__ import annotations

from memtrace.record.categories import Category
from memtrace.record.risk_reading import GrowthForecast, LargestBatch, PeakForecast, RiskReading, ShapeSource
from memtrace.record.units import format_bytes

_REMEDIES = {
    Category.ACTIVATIONS: "use gradient checkpointing, a smaller micro batch with more accumulation, or a shorter "
    "maximum length",
    Category.TEMPORARIES: "use a smaller micro batch with more accumulation, a shorter maximum length, or a loss that "
    "does not hold all logits at once",
    Category.TRANSIENT_WEIGHTS: "load the weights in the precision that the forward pass uses, or gather fewer shards "
    "at a time",
    Category.INPUTS: "use a smaller micro batch",
    Category.OPTIMIZER_STATE: "shard the optimizer state (ZeRO 1 or FSDP), or use one of 8 bits",
    Category.UNATTRIBUTED: "look for tensors that are kept over steps, such as a loss added up without `.item()`",
}
_FOR_THE_REST = "shard the model (FSDP, ZeRO 3), or train fewer parameters (LoRA)"
_WHO_SAYS = {
    ShapeSource.SETTING: "max_tokens allows",
    ShapeSource.DATASET: "the dataset has",
    ShapeSource.LONGEST_SEEN: "was seen",
}


def advise(reading: RiskReading) -> str | None:
    """Returns what to tell the user: what will not fit, by when, and what to do; None where there is nothing to say.

    A reading without a capacity or a forecast says nothing. Whether the risk is high enough to speak is the caller's
    decision.
    """
    if reading.capacity_bytes is None or reading.peak is None:
        return None
    growth = reading.growth
    too_large = reading.peak.predicted_bytes > reading.capacity_bytes
    if growth is not None and growth.steps_to_limit is not None and not too_large:
        return _leak(growth, growth.steps_to_limit, reading.capacity_bytes)
    return _large_batch(reading.peak, reading.capacity_bytes)


def _large_batch(peak: PeakForecast, capacity: int) -> str:
    return (
        f"memory may run out at the longest batch: {_batch(peak.batch)} is expected to take "
        f"{format_bytes(peak.predicted_bytes)} ± {format_bytes(peak.band_bytes)} of {format_bytes(capacity)}, most of "
        f"what the batch decides being {peak.category}; {_REMEDIES.get(peak.category, _FOR_THE_REST)}"
    )


def _leak(growth: GrowthForecast, steps: int, capacity: int) -> str:
    when = "" if growth.seconds_to_limit is None else f" ({_duration(growth.seconds_to_limit)})"
    return (
        f"persistent memory grows by {format_bytes(growth.bytes_per_step)} a step, most of it "
        f"{growth.category}: the peak reaches {format_bytes(capacity)} in about {steps} steps{when}; "
        f"{_REMEDIES.get(growth.category, _FOR_THE_REST)}"
    )


def _batch(batch: LargestBatch) -> str:
    return f"one of {batch.tokens} tokens, as {_WHO_SAYS[batch.source]},"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

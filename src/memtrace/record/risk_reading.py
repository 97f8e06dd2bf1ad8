"""What is forecast of a run's memory: plain data that the risk calculation makes and exporters show."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memtrace.record.categories import Category


class ShapeSource(StrEnum):
    """Who says which batch is the largest that the run can still meet."""

    SETTING = "setting"
    """`max_tokens` of the settings."""
    DATASET = "dataset"
    """The lengths of the training data, as the adapter read them."""
    LONGEST_SEEN = "longest_seen"
    """Nobody: the largest batch so far stands for it, and a larger one is not forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestBatch:
    """The largest micro batch that the run can still meet."""

    tokens: int
    """Samples x positions of one micro batch, padding included."""
    positions: int | None = None
    """Positions of its longest sample; None where only the tokens are known."""
    source: ShapeSource


def largest_by_setting(max_tokens: int | None) -> LargestBatch | None:
    """Returns the batch that the setting `max_tokens` describes; None where it is not set."""
    return None if max_tokens is None else LargestBatch(tokens=max_tokens, source=ShapeSource.SETTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakForecast:
    """The peak of the largest batch that the run can still meet."""

    predicted_bytes: int
    """Bytes allocated at once at the peak of such a step."""
    band_bytes: int
    """Half width of the band around it that holds 95 of 100 such peaks, as far as the steps so far can tell."""
    batch: LargestBatch
    points: int
    """Steps of different shapes that it was learned from."""
    quadratic: bool
    """True where the peak was seen to grow with the square of the length, as with attention that stores its scores."""
    category: Category
    """What takes most of what the batch decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthForecast:
    """Persistent memory that grows with every step."""

    category: Category
    """What grows most."""
    bytes_per_step: float
    steps_to_limit: int | None
    """Steps until the peak reaches the capacity at this rate; None where the capacity is not known."""
    seconds_to_limit: float | None
    """The same in seconds, at the pace of the last steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskReading:
    """How near the run is to the end of its memory. None where something needed for it is not known."""

    step: int
    """Number of the step after which this was calculated."""
    capacity_bytes: int | None = None
    """What the run's tensors may take in all: what they take now plus what can still be allocated."""
    worst_peak_bytes: int | None = None
    """The highest peak seen since the run began."""
    peak: PeakForecast | None = None
    growth: GrowthForecast | None = None
    oom_risk_ratio: float | None = None
    """0 (out of the question) to 1 (certain): `docs/risk.md` defines it."""

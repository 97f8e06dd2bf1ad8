"""The forecast of the peak: what a step takes at most, as a function of the shape of its largest micro batch.

A peak has a part that no batch decides (weights, optimizer state, what leaked so far) and a part that the batch does.
Only the second is learned, from steps whose peak is known, so that the forecast follows a run whose first part grows.
The second part has a floor that small batches do not get below: the temporaries inside `optimizer.step()`.
"""

from __future__ import annotations

from memtrace.record.breakdown import BatchShape, Breakdown
from memtrace.record.categories import PERSISTENT, Category, Phase
from memtrace.record.risk_reading import LargestBatch, PeakForecast
from memtrace.risk.shapes import ShapePoint, estimate

MAX_POINTS = 96
"""Shapes that are kept; the smallest ones go first, because they say least about the largest."""
MIN_BAND_RATIO = 0.01
"""The band is at least this share of the forecast: allocators round, libraries choose other algorithms."""

BASE = frozenset({*PERSISTENT, Category.WORKSPACES, Category.UNATTRIBUTED} - {Category.GRADIENTS})
"""What is there before a step begins and stays after it. Gradients come and go within a step."""


def base_bytes(breakdown: Breakdown) -> int:
    """Returns the bytes that no batch decides."""
    return sum(size for key, size in breakdown.entries.items() if key.category in BASE)


def positions_of(batch: BatchShape) -> int:
    """Returns the positions of each sample of the largest micro batch, padding included."""
    return batch.shape[1] if len(batch.shape) > 1 else 1


class PeakModel:
    """Learns from the peaks of steps and forecasts the peak of a batch. Holds at most `MAX_POINTS` shapes."""

    def __init__(self) -> None:
        self._points: dict[tuple[int, int], ShapePoint] = {}
        self._floor: int | None = None
        self._category = Category.ACTIVATIONS

    @property
    def longest(self) -> tuple[int, int] | None:
        """Tokens and positions of the largest shape that was learned from; None before the first one."""
        return max(self._points) if self._points else None

    def learn_traced(self, peak: Breakdown, batch: BatchShape) -> None:
        """Takes in the peak of a traced step. One inside the optimizer says nothing about larger batches."""
        beyond = peak.total_bytes - base_bytes(peak)
        in_optimizer = any(
            key.category is Category.TEMPORARIES and key.component == Phase.OPTIMIZER for key in peak.entries
        )
        if in_optimizer or not peak[Category.ACTIVATIONS]:
            self._floor = max(self._floor or 0, beyond)
        else:
            self._category = max(set(Category) - BASE - {Category.GRADIENTS}, key=peak.__getitem__)
            self.learn(beyond, batch)

    def learn(self, nbytes: int, batch: BatchShape) -> None:
        """Takes in that a batch took this much beyond the base; of several of one shape the highest counts."""
        shape = (batch.largest_micro_batch_tokens, positions_of(batch))
        known = self._points.get(shape)
        if known is None or known.nbytes < nbytes:
            self._points[shape] = ShapePoint(tokens=shape[0], positions=shape[1], nbytes=nbytes)
        if len(self._points) > MAX_POINTS:
            del self._points[min(self._points)]

    def forecast(self, batch: LargestBatch, *, base: int) -> PeakForecast | None:
        """Returns the forecast for a batch on top of `base` bytes; None before the first step with a known peak.

        It is never below the peak of a smaller batch that was seen.
        """
        if not self._points and self._floor is None:
            return None
        nbytes, band, quadratic = float(self._floor or 0), 0.0, False
        if self._points:
            positions = batch.positions or self._likely_positions(batch.tokens)
            forecast = estimate(tuple(self._points.values()), batch.tokens, positions)
            nbytes = max(nbytes, forecast.nbytes, self._highest_within(batch.tokens, positions))
            band, quadratic = forecast.band, forecast.quadratic
        predicted = base + round(nbytes)
        return PeakForecast(
            predicted_bytes=predicted,
            band_bytes=round(max(band, MIN_BAND_RATIO * predicted)),
            batch=batch,
            points=len(self._points),
            quadratic=quadratic,
            category=self._category,
        )

    def _likely_positions(self, tokens: int) -> int:
        """Returns the positions of a batch of which only the tokens are known: as many samples as the longest seen."""
        longest_tokens, longest_positions = max(self._points)
        return max(1, round(tokens * longest_positions / max(longest_tokens, 1)))

    def _highest_within(self, tokens: int, positions: int) -> int:
        """Returns the highest peak of a batch that was no larger in either direction."""
        return max(
            (p.nbytes for p in self._points.values() if p.tokens <= tokens and p.positions <= positions), default=0
        )

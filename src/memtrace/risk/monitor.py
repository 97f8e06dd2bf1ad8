"""The risk of a run, step by step: what its steps teach, against what it may use."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import erfc, hypot, sqrt

from memtrace.record.breakdown import Breakdown, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.risk_reading import GrowthForecast, LargestBatch, PeakForecast, RiskReading, ShapeSource
from memtrace.risk.growth import Growth, GrowthTrend, Level
from memtrace.risk.peak import BASE, PeakModel

WARN_AT = 0.5
"""`oom_risk_ratio` from which a run is more likely than not to run out of memory."""
HORIZON_SECONDS = 3600.0
"""A leak that takes longer than this to reach the limit counts for proportionally less."""
STANDARD_DEVIATIONS = 1.96
"""Half width of a 95 % band of a normal distribution, in standard deviations."""
BESIDE_BAND_RATIO = 0.05
"""Half width of the 95 % band of what is on the device beside torch: kernels are loaded as they are first used. It grew
by 6 % within 220 steps on an H200."""
READINGS = 16
"""On a CPU, capacities that are looked back on: a reading of the process may fall into the middle of a step."""


class RiskMonitor:
    """Follows one run. Its state is bounded: 96 shapes of batches, 64 levels of persistent memory.

    Costs some tens of microseconds for a step that teaches nothing and a few milliseconds for a traced one.

    Args:
        largest: the largest micro batch that the run can still meet; None where nobody knows.
    """

    def __init__(self, largest: LargestBatch | None = None) -> None:
        self._largest = largest
        self._model = PeakModel()
        self._trend = GrowthTrend()
        self._capacities: deque[int] = deque(maxlen=READINGS)
        self._worst_peak: int | None = None
        self._leftover = 0
        """Bytes that outlived the last step and that no persistent category holds."""
        self._workspaces = 0
        """Bytes of libraries' workspaces at the end of the last step."""
        self._left_behind = 0
        """On a CPU, what all steps together have left behind, less what is known to have gone since."""
        self._traced_leftover = 0
        """On a CPU, what the last traced step has left behind."""
        self._replaced = 0
        """What has gone since then of what steps had left behind."""
        self._last_level: int | None = None
        """On a CPU, the number of the last step whose leftovers were added."""
        self._forecast: tuple[PeakForecast, int] | None = None
        """The newest forecast and the base that it stands on."""

    def expect(self, largest: LargestBatch) -> None:
        """Sets the largest micro batch that the run can still meet, for the forecasts from now on."""
        self._largest = largest
        self._forecast = None

    def observe(self, record: StepRecord, *, headroom_bytes: int | None) -> RiskReading:
        """Takes in a step and returns the risk after it.

        Args:
            record: the step; records come in order.
            headroom_bytes: what could still be allocated when it had ended; None where that is not known.
        """
        by_category = self._persistent(record)
        base = sum(by_category.values())
        level = self._level(record, by_category)
        if level is not None:
            self._trend.add(level)
        learned = self._learn(record, base)
        capacity = self._capacity(record, headroom_bytes)
        peak = self._forecast_peak(base, learned)
        growth = _until_limit(self._trend.growth(), capacity, base if peak is None else peak.predicted_bytes)
        return RiskReading(
            step=record.step,
            capacity_bytes=capacity,
            worst_peak_bytes=self._worst_peak,
            peak=peak,
            growth=growth,
            oom_risk_ratio=_risk(peak, growth, capacity, _beside(record)),
        )

    def _persistent(self, record: StepRecord) -> dict[Category, int]:
        """Returns what outlived the step, by category. What only a trace can see is carried over from the last one."""
        end = record.moments.get(Moment.STEP_END)
        if end is None:
            return {}
        found = {category: size for category, size in end.by_category().items() if category in BASE}
        if record.traced:
            self._workspaces, self._leftover = end[Category.WORKSPACES], end[Category.UNATTRIBUTED]
        elif end.allocated_bytes is not None:
            self._leftover = max(0, end.allocated_bytes - end.total_bytes - self._workspaces)
        return {**found, Category.WORKSPACES: self._workspaces, Category.UNATTRIBUTED: self._leftover}

    def _level(self, record: StepRecord, by_category: Mapping[Category, int]) -> Level | None:
        """Returns what outlived the step, in a form in which steps can be compared; None where they cannot.

        A trace on a CPU begins with what the ledger knows: it has what this step leaves behind, and not what earlier
        steps did. There the leftovers are added up, those of the last trace for each step since, less the share of them
        that is replaced from step to step, as far as that is seen; and the process must bear them out: see
        `Level.process_bytes`.
        """
        end = record.moments.get(Moment.STEP_END)
        if end is None:
            return None
        if record.allocator is not None:
            if end.allocated_bytes is None:
                return None
            return Level(step=record.step, unix_seconds=record.unix_seconds, by_category=by_category)
        process = None if record.device_memory is None else record.device_memory.process_bytes
        if process is None or (self._last_level is None and not record.traced):
            return None
        steps = 1 if self._last_level is None else max(1, record.step - self._last_level)
        self._last_level = record.step
        self._replaced += record.replaced_bytes
        kept = max(0, self._traced_leftover - self._replaced)
        if record.traced:
            self._traced_leftover, self._replaced = self._leftover, 0
            added = (steps - 1) * kept + self._leftover
        else:
            added = steps * kept
        self._left_behind = max(0, self._left_behind + added - record.replaced_bytes)
        return Level(
            step=record.step,
            unix_seconds=record.unix_seconds,
            by_category={**by_category, Category.UNATTRIBUTED: self._left_behind},
            process_bytes=process,
        )

    def _learn(self, record: StepRecord, base: int) -> bool:
        """Learns from a step whose peak is known; returns whether it did."""
        peak = record.moments.get(Moment.PEAK)
        if peak is None or record.traced_from_micro_batch is not None:
            return False
        if record.traced:
            self._worst_peak = max(self._worst_peak or 0, peak.total_bytes)
            if record.batch is not None:
                self._model.learn_traced(peak, record.batch)
        elif peak.allocated_bytes is not None:  # the high-water mark rose within the step
            self._worst_peak = max(self._worst_peak or 0, peak.allocated_bytes)
            if record.batch is not None:
                self._model.learn(peak.allocated_bytes - base, record.batch)
        else:
            return False
        return record.batch is not None

    def _capacity(self, record: StepRecord, headroom_bytes: int | None) -> int | None:
        """Returns what tensors may take in all: what they take, plus the headroom; 0 where others take it all."""
        end = record.moments.get(Moment.STEP_END)
        if headroom_bytes is None or end is None:
            return None
        if record.allocator is not None:
            return max(0, headroom_bytes + record.allocator.allocated_bytes)
        self._capacities.append(max(0, headroom_bytes + _held(end)))
        return max(self._capacities)

    def _forecast_peak(self, base: int, learned: bool) -> PeakForecast | None:
        if self._forecast is None or learned or self._forecast[1] != base:
            batch = self._largest_batch()
            forecast = None if batch is None else self._model.forecast(batch, base=base)
            self._forecast = None if forecast is None else (forecast, base)
        return None if self._forecast is None else self._forecast[0]

    def _largest_batch(self) -> LargestBatch | None:
        """Returns the largest micro batch to come: what somebody says, unless a larger one was met already."""
        longest = self._model.longest
        if longest is None:
            return self._largest
        tokens, positions = longest
        if self._largest is not None and self._largest.tokens >= tokens:
            return self._largest
        return LargestBatch(tokens=tokens, positions=positions, source=ShapeSource.LONGEST_SEEN)


def _held(end: Breakdown) -> int:
    return end.total_bytes if end.allocated_bytes is None else end.allocated_bytes


def _beside(record: StepRecord) -> int:
    """Returns what this process has on the device beside torch, as far as that is known."""
    device = record.device_memory
    return 0 if device is None or record.allocator is None else device.non_torch_bytes or 0


def _until_limit(growth: Growth | None, capacity: int | None, peak: int) -> GrowthForecast | None:
    if growth is None:
        return None
    steps = None if capacity is None else max(0, int((capacity - peak) / growth.bytes_per_step))
    return GrowthForecast(
        category=growth.category,
        bytes_per_step=growth.bytes_per_step,
        steps_to_limit=steps,
        seconds_to_limit=None if steps is None else steps * growth.seconds_per_step,
    )


def _risk(peak: PeakForecast | None, growth: GrowthForecast | None, capacity: int | None, beside: int) -> float | None:
    """Returns the larger of two risks: that the largest batch does not fit, and that a leak fills what is left.

    Neither what the batch takes nor what is beside torch, which bounds the capacity, is known to the byte.
    """
    if capacity is None or peak is None:
        return None
    deviation = hypot(peak.band_bytes, BESIDE_BAND_RATIO * beside) / STANDARD_DEVIATIONS
    too_large = (
        0.5 * erfc((capacity - peak.predicted_bytes) / (deviation * sqrt(2)))
        if deviation
        else float(peak.predicted_bytes > capacity)
    )
    if growth is None or growth.seconds_to_limit is None:
        return too_large
    return max(too_large, min(1.0, HORIZON_SECONDS / max(growth.seconds_to_limit, HORIZON_SECONDS)))

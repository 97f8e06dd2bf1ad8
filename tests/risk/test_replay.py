"""The forecast against what happened, on recorded fine-tunes of several families and recipes.

`tests/fixtures/runs/record_runs.py` made the records. A run is replayed up to the step before its longest batch; what
was then forecast for a batch of that shape is compared with the peak that it had.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.risk_reading import LargestBatch, PeakForecast, ShapeSource
from memtrace.risk import RiskMonitor
from memtrace.risk.peak import positions_of

RUNS = sorted((Path(__file__).parents[1] / "fixtures" / "runs").glob("*.jsonl"))
NAMES = [path.stem for path in RUNS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    forecast: PeakForecast
    happened: int

    @property
    def error(self) -> float:
        """Of the forecast, as a share of what happened."""
        return abs(self.forecast.predicted_bytes - self.happened) / self.happened

    @property
    def within_band(self) -> bool:
        return abs(self.forecast.predicted_bytes - self.happened) <= self.forecast.band_bytes


def tokens_of(record: StepRecord) -> int:
    assert record.batch is not None
    return record.batch.largest_micro_batch_tokens


def replay(path: Path, *, up_to: float = 1.0) -> Replay:
    """Replays a run without its longest batch, and without all that have more than a share of its tokens."""
    records = list(read_step_log(path))
    longest = max(records, key=tokens_of)
    assert longest.batch is not None
    batch = LargestBatch(tokens=tokens_of(longest), positions=positions_of(longest.batch), source=ShapeSource.DATASET)
    monitor = RiskMonitor(batch)
    forecast: PeakForecast | None = None
    for record in records:
        if up_to == 1.0 and record is longest:
            break
        if tokens_of(record) <= up_to * batch.tokens:
            forecast = monitor.observe(record, headroom_bytes=None).peak
    assert forecast is not None
    return Replay(forecast=forecast, happened=longest.moments[Moment.PEAK].total_bytes)


def test_there_are_runs_to_judge_by() -> None:
    """At least six recorded runs, each with batches of many lengths."""
    assert len(RUNS) >= 6
    for path in RUNS:
        assert len({tokens_of(record) for record in read_step_log(path)}) >= 20


def test_longest_batch_is_foreseen() -> None:
    """In the median the forecast is within 5 percent of what happened."""
    assert median(replay(path).error for path in RUNS) <= 0.05


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
def test_forecast_is_right_or_says_that_it_may_be_wrong(path: Path) -> None:
    """Each forecast is within 10 percent, or its band reaches to what happened."""
    found = replay(path)
    assert found.error <= 0.10 or found.within_band


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
@pytest.mark.parametrize("up_to", [0.5, 0.25])
def test_forecast_from_short_batches_only(path: Path, up_to: float) -> None:
    """From batches of at most a half, or a quarter, of the longest one's tokens the same holds."""
    found = replay(path, up_to=up_to)
    assert found.error <= 0.10 or found.within_band


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
def test_bands_are_not_just_wide(path: Path) -> None:
    """After 40 steps the band of the forecast for the longest batch so far is below 10 percent."""
    monitor = RiskMonitor()
    for record in list(read_step_log(path))[:40]:
        reading = monitor.observe(record, headroom_bytes=None)
    assert reading.peak is not None
    assert reading.peak.band_bytes <= 0.10 * reading.peak.predicted_bytes


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
def test_healthy_run_has_no_growth(path: Path) -> None:
    """No recorded run leaks, and none is said to."""
    monitor = RiskMonitor()
    for record in read_step_log(path):
        assert monitor.observe(record, headroom_bytes=10**9).growth is None

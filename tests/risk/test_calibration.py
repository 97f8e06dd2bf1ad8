"""The risk is a probability: of readings that say so much, about so many came true. The alert's threshold follows.

Each recorded fine-tune is replayed up to its longest batch. After each step the risk is taken, as docs/risk.md defines
it, against capacities from 20 % below the peak that this batch then had to 20 % above it: below it the memory would
have run out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import NormalDist

import pytest
from test_replay import RUNS, tokens_of

from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.categories import Moment
from memtrace.record.risk_reading import LargestBatch, ShapeSource
from memtrace.risk import RiskMonitor
from memtrace.risk.monitor import STANDARD_DEVIATIONS
from memtrace.risk.peak import positions_of

RULES = Path(__file__).parents[2] / "integrations" / "prometheus" / "memtrace.rules.yml"
CAPACITIES = [0.801 + 0.002 * step for step in range(200)]
"""Shares of the peak that the longest batch then had."""
Reading = tuple[str, float, bool]
"""The run, its risk, and whether it came true."""


def readings_of(path: Path) -> Iterator[Reading]:
    """Yields the risk after each step before the longest batch, for each capacity."""
    records = list(read_step_log(path))
    longest = max(records, key=tokens_of)
    assert longest.batch is not None
    batch = LargestBatch(tokens=tokens_of(longest), positions=positions_of(longest.batch), source=ShapeSource.DATASET)
    happened = longest.moments[Moment.PEAK].total_bytes
    monitor = RiskMonitor(batch)
    for record in records[: records.index(longest)]:
        forecast = monitor.observe(record, headroom_bytes=None).peak
        if forecast is not None:
            expected = NormalDist(forecast.predicted_bytes, forecast.band_bytes / STANDARD_DEVIATIONS)
            for share in CAPACITIES:
                yield path.stem, 1 - expected.cdf(happened * share), share < 1


@cache
def readings() -> list[Reading]:
    return [reading for path in RUNS for reading in readings_of(path)]


def threshold() -> float:
    """Returns the risk from which MemtraceOomPredicted fires."""
    found = re.search(r"memtrace_threshold:oom_risk:ratio, expr: vector\(([\d.]+)\)", RULES.read_text())
    assert found
    return float(found[1])


@pytest.mark.parametrize(("least", "most"), [(0.1, 0.3), (0.3, 0.5), (0.5, 0.65), (0.65, 0.8), (0.8, 0.9), (0.9, 0.98)])
def test_so_many_come_true_as_the_risk_says(least: float, most: float) -> None:
    """In each band of the risk about so many came true as the readings said on average; rather more than fewer."""
    within = [(risk, came_true) for _, risk, came_true in readings() if least <= risk < most]
    said, came = (sum(column) / len(within) for column in zip(*within, strict=True))
    print(f"{least} to {most}: {len(within)} readings, said {said:.3f}, came true {came:.3f}")
    assert said - 0.05 <= came <= said + 0.15


@pytest.mark.parametrize("name", [path.stem for path in RUNS])
def test_tickets_are_right_as_often_as_the_threshold_says(name: str) -> None:
    """In no recorded run was more than one reading in five wrong that lay beyond the threshold."""
    beyond = [came_true for run, risk, came_true in readings() if run == name and risk > threshold()]
    assert threshold() == 0.8
    assert not beyond or sum(beyond) / len(beyond) >= threshold()


def test_the_threshold_still_sees_most_of_what_comes() -> None:
    """Of the readings that came true three quarters lie beyond it: a higher one would be silent for more of them."""
    came = [risk for _, risk, came_true in readings() if came_true]
    seen = [risk for risk in came if risk > threshold()]
    print(f"{len(seen) / len(came):.3f} of what came true lies beyond {threshold()}")
    assert len(seen) >= 0.75 * len(came)

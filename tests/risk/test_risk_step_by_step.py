"""The recorded run with varying lengths, step by step: what lies between its scrapes is drawn.

Each step goes where a live one goes: the allocator's counters and the driver's sample to the sampler, the record to
what the tracer publishes. The driver is asked once a second, wherever the step is; steps see its last answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from recorded_run import GB, LIMIT, RUN, Run, assert_no_alert, record_of
from records import breakdown

from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.risk_reading import LargestBatch, ShapeSource
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.tracing.publication import Publication

STEPS = 232
STEP_SECONDS, PERIOD_SECONDS = 0.14, 1.0
FORECAST_FROM = 33
"""The step from which on the forecast was right in the recorded run."""
SAMPLES, SHORTEST, LONGEST = 8, 128, 1646
BYTES_A_TOKEN, BESIDE_TOKENS = 611_692, 1_157_214_538
"""All recorded peaks but the first lie on this line, to 80 bytes."""
BEFORE_STATES = 656_482_304
"""What the peak of the first step was lower: no states yet, and one workspace of cuBLAS."""
KEPT = 1_330_264_576
"""What outlives each step; inputs and rounding are besides."""
SCRAPED: Mapping[int, Mapping[str, int]] = {scrape["steps"]: scrape for scrape in RUN["scrapes"]}
BESIDE = (
    (0, 801_112_064),
    (57, 811_597_824),
    (65, 813_694_976),
    (89, 819_986_432),
    (137, 834_666_496),
    (153, 836_763_648),
    (201, 847_249_408),
    (209, 849_346_560),
    (217, 851_443_712),
)
"""What the recorded run had beside torch, by the step at which it was seen: each rise comes at once here."""


def as_recorded(step: int) -> int:
    return [nbytes for begin, nbytes in BESIDE if begin <= step][-1]


def steady(_: int) -> int:
    return 800_000_000


class Steps:
    """One run: what each step takes and reserves, and the device beside it."""

    def __init__(self, beside: Callable[[int], int], seed: int) -> None:
        self._beside, self._draw, self._run = beside, random.Random(seed), Run()
        identity = RunIdentity(run_name="lengths", device="cuda:0")
        largest = LargestBatch(tokens=16384, source=ShapeSource.SETTING)
        self._publication = Publication(identity=identity, history=8, largest=largest, plan={}, skipped=lambda: 0)
        self._publication.begin(identity, LIMIT)
        self._reserved, self._highest, self._next_sample = 2_388_656_128, 0, self._draw.random()

    def states(self) -> Iterator[Snapshot]:
        """Yields what exporters see after each step."""
        for step in range(1, STEPS + 1):
            yield self._after(step)

    def _after(self, step: int) -> Snapshot:
        known, run = SCRAPED.get(step), self._run
        tokens = known["tokens"] if known else SAMPLES * self._draw.randint(SHORTEST, LONGEST)
        peak = BESIDE_TOKENS + BYTES_A_TOKEN * tokens + self._draw.randint(-80, 22)
        if known:
            reserved = known["reserved_bytes"]
        else:  # rises with what a step takes, and falls where the allocator has given its cache back
            reserved = max(self._reserved, peak + peak // 10)
            reserved = reserved if reserved < LIMIT - GB else peak + peak // 50
        begun, end = step * STEP_SECONDS, (step + 1) * STEP_SECONDS
        middle = begun + self._draw.random() * STEP_SECONDS
        while self._next_sample < end:
            run.now = self._next_sample
            self._sample(step, self._reserved if run.now < middle else reserved)
            self._next_sample += PERIOD_SECONDS
        run.now, self._reserved = end, reserved
        rises, self._highest = peak > self._highest, max(self._highest, peak)
        allocated = (known or self._draw.choice(RUN["scrapes"][1:]))["allocated_bytes"]
        allocator = run.note(reserved, allocated)
        scrape = {
            "steps": step,
            "tokens": tokens,
            "peak_bytes": peak,
            "allocated_bytes": KEPT,
            "unix_seconds": 1.8e9 + end,
        }
        record = replace(record_of(scrape, allocator, run.newest()), step_seconds=STEP_SECONDS)  # type: ignore[arg-type]
        self._publication.publish(as_live(record, rises=rises))
        return replace(self._publication.snapshot, device_memory=run.newest())

    def _sample(self, step: int, reserved: int) -> None:
        process, total = reserved + self._beside(step), RUN["scrapes"][0]["total_bytes"]
        says: dict[str, Any] = {"process_bytes": process, "other_processes_bytes": 2 * GB}
        self._run.sample(total_bytes=total, used_bytes=process + 2 * GB, free_bytes=total - process - 2 * GB, **says)


def as_live(record: StepRecord, *, rises: bool) -> StepRecord:
    """The first two steps are traced, the first of them without states at its peak; the others are counted.

    A counted step knows its peak where the high-water mark rose within it.
    """
    assert record.allocator is not None
    end, peak = record.moments[Moment.STEP_END], record.moments[Moment.PEAK]
    inputs = {EntryKey(Category.INPUTS, "", "int64"): record.allocator.allocated_bytes - KEPT}
    end = breakdown(Moment.STEP_END, {**end.entries, **inputs})
    if record.step == 1:
        without = {key: size - BEFORE_STATES * (key.category is Category.WEIGHTS) for key, size in peak.entries.items()}
        peak = breakdown(Moment.PEAK, without)
    if record.step > 2:
        end = replace(end, estimated=True)
        peak = replace(peak, estimated=True, allocated_bytes=peak.total_bytes if rises else None)
        record = replace(record, traced=False)
    return replace(record, moments={Moment.STEP_END: end, Moment.PEAK: peak})


RUNS = {"as recorded": (as_recorded, 0), **{f"steady {seed}": (steady, seed) for seed in range(1, 4)}}


@cache
def states(name: str) -> tuple[Snapshot, ...]:
    """The states from the step on from which the forecast was right."""
    return tuple(Steps(*RUNS[name]).states())[FORECAST_FROM:]


@pytest.mark.parametrize("name", RUNS)
def test_the_risk_moves_by_less_than_a_tenth_a_step(name: str) -> None:
    """With a forecast of 11.18 GB and a limit of 12; what rises beside torch rises at once."""
    risks = []
    for state in states(name):
        assert state.risk is not None
        assert state.risk.peak is not None
        assert abs(state.risk.peak.predicted_bytes - 11.18 * GB) < 0.001 * 11.18 * GB
        assert state.risk.oom_risk_ratio is not None
        risks.append(state.risk.oom_risk_ratio)
    assert max(abs(after - before) for before, after in pairwise(risks)) < 0.1
    assert 0.2 < min(risks) < max(risks) < 0.8
    reserved = [
        state.latest.allocator.reserved_bytes for state in states(name) if state.latest and state.latest.allocator
    ]
    assert any(after > before for before, after in pairwise(reserved))
    assert any(after < before for before, after in pairwise(reserved))


@pytest.mark.parametrize("name", RUNS)
def test_readings_are_steady_in_each_step(name: str) -> None:
    """Of what is beside torch 5 %, of the capacity 3 %, in every step."""
    beside = RUNS[name][0]
    for state in states(name):
        assert state.latest is not None
        assert state.device is not None
        assert state.risk is not None
        assert state.device.non_torch_bytes == pytest.approx(beside(state.latest.step), rel=0.05)
        assert state.risk.capacity_bytes == pytest.approx(LIMIT - beside(state.latest.step), rel=0.03)


@pytest.mark.parametrize("name", ["as recorded", "steady 1"])
def test_no_alert_fires_on_any_step(name: str, tmp_path: Path) -> None:
    """Two hours of such steps, a scrape every other step."""
    assert_no_alert(list(islice(cycle(states(name)[::2]), 121)), tmp_path)

"""The risk of a run, step by step."""

from dataclasses import replace

import pytest
from risk_steps import counted, on_cpu, traced

from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.risk_reading import LargestBatch, RiskReading, ShapeSource
from memtrace.risk import RiskMonitor


def largest(tokens: int) -> LargestBatch:
    return LargestBatch(tokens=tokens, positions=tokens // 2, source=ShapeSource.SETTING)


def follow(monitor: RiskMonitor, lengths: list[int], *, capacity: int | None = 1000, leak: int = 0) -> RiskReading:
    """Returns the reading after traced steps of these lengths within a capacity."""
    reading = RiskReading(step=0)
    for step, positions in enumerate(lengths, 1):
        record = traced(step, positions=positions, leaked=leak * step)
        headroom = None if capacity is None else capacity - 100 - leak * step
        reading = monitor.observe(record, headroom_bytes=headroom)
    return reading


def test_risk_is_high_before_the_batch_that_does_not_fit() -> None:
    """Steps of up to 40 positions forecast that 120 positions (1060 bytes) do not fit 1000."""
    reading = follow(RiskMonitor(largest(240)), [10, 20, 30, 40, 15, 25, 35])
    assert reading.peak is not None
    assert reading.peak.predicted_bytes == 100 + 4 * 240
    assert reading.oom_risk_ratio is not None
    assert reading.oom_risk_ratio > 0.99


def test_risk_is_low_where_the_largest_batch_fits() -> None:
    """The same steps with a largest batch of 100 positions are no risk."""
    reading = follow(RiskMonitor(largest(200)), [10, 20, 30, 40, 15, 25, 35])
    assert reading.oom_risk_ratio is not None
    assert reading.oom_risk_ratio < 0.01


def test_risk_is_a_half_where_the_forecast_is_the_capacity() -> None:
    """The definition: the probability that the largest batch takes more than there is."""
    reading = follow(RiskMonitor(largest(240)), [10, 20, 30, 40, 15, 25, 35], capacity=1060)
    assert reading.oom_risk_ratio == pytest.approx(0.5)


def test_longest_seen_stands_for_the_largest_batch() -> None:
    """Where nobody says how large batches can be, the largest one so far is forecast."""
    reading = follow(RiskMonitor(), [10, 40, 20])
    assert reading.peak is not None
    assert reading.peak.batch == LargestBatch(tokens=80, positions=40, source=ShapeSource.LONGEST_SEEN)


def test_a_batch_beyond_what_was_said_takes_its_place() -> None:
    """A largest batch that was exceeded is no longer believed."""
    reading = follow(RiskMonitor(largest(20)), [10, 40, 20])
    assert reading.peak is not None
    assert reading.peak.batch.tokens == 80


def test_leak_is_foretold_in_steps_and_seconds() -> None:
    """With 8 bytes a step and 740 left the limit is 92 steps or 184 seconds away, and the risk is certain."""
    reading = follow(RiskMonitor(), [10] * 10, leak=8)
    assert reading.growth is not None
    assert reading.growth.category is Category.UNATTRIBUTED
    assert reading.growth.bytes_per_step == 8
    assert reading.growth.steps_to_limit == (1000 - (100 + 80 + 80)) // 8
    assert reading.growth.seconds_to_limit == 2 * reading.growth.steps_to_limit
    assert reading.oom_risk_ratio == 1.0


def test_leak_that_takes_hours_is_a_smaller_risk() -> None:
    """Ten hours to the limit are a risk of a tenth."""
    reading = follow(RiskMonitor(), [10] * 10, capacity=18_260, leak=1)
    assert reading.growth is not None
    assert reading.growth.seconds_to_limit == pytest.approx(36_000, rel=0.01)
    assert reading.oom_risk_ratio == pytest.approx(0.1, rel=0.01)


def test_a_limit_that_others_fill_leaves_no_capacity() -> None:
    """Where the process is over its limit without any tensor, the capacity is 0 and the risk is certain."""
    reading = follow(RiskMonitor(), [10] * 3, capacity=-500)
    assert reading.capacity_bytes == 0
    assert reading.oom_risk_ratio == 1.0


def test_without_a_capacity_there_is_a_forecast_and_no_risk() -> None:
    """What the run may use is not known: the forecast stands alone."""
    reading = follow(RiskMonitor(), [10] * 10, capacity=None, leak=1)
    assert reading.peak is not None
    assert reading.growth is not None
    assert reading.growth.steps_to_limit is None
    assert (reading.capacity_bytes, reading.oom_risk_ratio) == (None, None)


def test_counted_steps_teach_by_the_high_water_mark() -> None:
    """On a GPU a step that raises the allocator's mark has that peak; an estimate teaches nothing."""
    monitor = RiskMonitor(largest(200))
    marks = [(50, 900, False), (10, 900, False), (60, 980, True), (20, 980, False), (70, 1060, True), (80, 1140, True)]
    reading = RiskReading(step=0)
    for step, (positions, mark, rose) in enumerate(marks):
        reading = monitor.observe(counted(step, positions=positions, mark=mark, rose=rose), headroom_bytes=3000)
    assert reading.peak is not None
    assert reading.peak.points == 3
    assert reading.peak.predicted_bytes == 100 + 400 + 4 * 200
    assert reading.worst_peak_bytes == 1140
    assert reading.capacity_bytes == 3000 + 100


def test_leak_outside_the_ledger_shows_on_counted_steps() -> None:
    """What the allocator has in use at the end of a step beyond the known categories is unattributed."""
    monitor = RiskMonitor()
    for step in range(10):
        record = counted(step, positions=10, mark=500, allocated=100 + 10 * step)
        reading = monitor.observe(record, headroom_bytes=1000 - 10 * step)
    assert reading.growth is not None
    assert reading.growth.category is Category.UNATTRIBUTED
    assert reading.growth.bytes_per_step == 10


def test_a_reading_inside_a_step_does_not_take_capacity_away() -> None:
    """On a CPU the process is read at any time; the best of the recent readings is the capacity."""
    monitor = RiskMonitor()
    monitor.observe(on_cpu(traced(1), process=500), headroom_bytes=900)
    assert monitor.observe(on_cpu(traced(2), process=1100), headroom_bytes=300).capacity_bytes == 1000


def grown_on_cpu(*, left_behind: int, process: int) -> RiskReading:
    """Returns the reading after ten steps that leave so much behind each, while the process grows by so much."""
    monitor = RiskMonitor()
    for step in range(10):
        record = on_cpu(traced(step, leaked=left_behind), process=500 + process * step)
        reading = monitor.observe(record, headroom_bytes=900 - process * step)
    return reading


def test_on_a_cpu_a_leak_is_what_steps_leave_behind_and_the_process_keeps() -> None:
    """No trace there sees what an earlier step has left behind: it is added up, and the resident set confirms it."""
    growth = grown_on_cpu(left_behind=10, process=10).growth
    assert growth is not None
    assert growth.category is Category.UNATTRIBUTED
    assert growth.bytes_per_step == 10


@pytest.mark.parametrize("every", [1, 5])
def test_on_a_cpu_one_trace_finds_a_leak_and_it_does_not_cease(every: int) -> None:
    """As by default settings: one step is traced, some have records, and the process grows by pages, every 12 steps."""
    monitor = RiskMonitor()
    found = []
    for step in range(1, 3000, every):
        record = on_cpu(traced(step, positions=10, leaked=7), process=10_000 + 7 * (step // 12) * 12)
        if step != 1 + every:
            end = replace(
                record.moments[Moment.STEP_END], allocated_bytes=None, entries={EntryKey(Category.WEIGHTS, "", ""): 100}
            )
            record = replace(record, traced=False, moments={Moment.STEP_END: end})
        found.append(monitor.observe(record, headroom_bytes=10**6).growth)
    assert {growth and growth.bytes_per_step for growth in found[100 // every :]} == {7}


def test_on_a_cpu_a_process_that_warms_up_bears_no_leak_out() -> None:
    """The last logits outlive each step; the first steps make the process grow by as much, and then it stays."""
    monitor = RiskMonitor()
    for step in range(1, 200):
        record = on_cpu(traced(step, positions=10, leaked=10), process=10_000 + 15 * min(step, 16))
        growth = monitor.observe(record, headroom_bytes=10**6).growth
        assert growth is None or step < 32
    assert growth is None


def test_on_a_cpu_scalars_that_each_step_leaves_do_not_add_up_in_a_long_run() -> None:
    """The last loss outlives its step and is replaced; what the process grows by in an hour has other reasons."""
    monitor = RiskMonitor()
    for step in range(1, 40_000, 20):
        record = on_cpu(traced(step, positions=10, weights=100_000, leaked=1), process=10**6 + 2 * step)
        assert monitor.observe(record, headroom_bytes=10**6).growth is None


def test_on_a_cpu_what_the_next_step_replaces_is_no_leak() -> None:
    """Logits that live until the next step are left behind by every step, and the process does not grow."""
    assert grown_on_cpu(left_behind=10, process=0).growth is None


def test_on_a_cpu_a_process_that_grows_alone_is_no_leak_of_tensors() -> None:
    """Allocators and libraries warm up; no step leaves anything behind."""
    assert grown_on_cpu(left_behind=0, process=10).growth is None


def test_a_step_without_moments_or_batch_is_survived() -> None:
    """A step in which the model saw no tensor and nothing was read changes nothing."""
    monitor = RiskMonitor()
    before = monitor.observe(traced(1), headroom_bytes=900)
    after = monitor.observe(replace(traced(2), batch=None, moments={}, traced=False), headroom_bytes=None)
    assert after.worst_peak_bytes == before.worst_peak_bytes
    assert after.oom_risk_ratio is None


def test_workspaces_are_no_leak() -> None:
    """What cuBLAS keeps is known from the last trace: the counters of counted steps have it once, beside the leak."""
    monitor = RiskMonitor()
    first = traced(1, leaked=8)
    end = first.moments[Moment.STEP_END]
    kept = replace(end, entries={**end.entries, EntryKey(Category.WORKSPACES, "cublas", ""): 64}, allocated_bytes=172)
    reading = monitor.observe(replace(first, moments={**first.moments, Moment.STEP_END: kept}), headroom_bytes=800)
    for step in range(2, 12):
        reading = monitor.observe(counted(step, positions=10, mark=244, allocated=164 + 8 * step), headroom_bytes=700)
    assert reading.growth is not None
    assert reading.growth.category is Category.UNATTRIBUTED
    assert reading.growth.bytes_per_step == 8

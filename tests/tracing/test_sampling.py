"""When steps are traced: the account of wall time, and what makes a trace due sooner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from memtrace.record.breakdown import AllocatorReading, BatchShape, Breakdown, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.schedule import TraceSchedule, picture_changed

GIB = 2**30


def record(
    step: int,
    *,
    traced: bool,
    now: float = 0.0,
    seconds: float = 1.0,
    cost: float = 0.0,
    slowed: float = 0.0,
    tokens: int = 100,
    state: int = GIB,
    high_water: int | None = None,
) -> StepRecord:
    entries = {EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): state}
    allocator = None
    if high_water is not None:
        allocator = AllocatorReading(allocated_bytes=0, reserved_bytes=0, peak_allocated_bytes=high_water)
    return StepRecord(
        step=step,
        rank=0,
        device="cpu",
        traced=traced,
        unix_seconds=now,
        self_seconds=cost,
        slowed_seconds=slowed,
        step_seconds=seconds,
        batch=BatchShape(shape=(1, tokens), tokens=tokens, largest_micro_batch_tokens=tokens),
        allocator=allocator,
        moments={moment: Breakdown(moment=moment, entries=entries) for moment in (Moment.STEP_END, Moment.PEAK)},
    )


@dataclass
class Run:
    """A training of equal steps, each of them counted or traced as the schedule says."""

    schedule: TraceSchedule
    step_seconds: float = 1.0
    trace_seconds: float = 0.1
    """What memtrace takes on a traced step; half of it makes the step itself longer."""
    counted_cost: float = 0.0
    now: float = 0.0
    spent: float = 0.0
    step: int = 0

    def go(self, steps: int, **changes: int) -> list[int]:
        """Returns the numbers of the traced steps."""
        traced = []
        for _ in range(steps):
            self.step += 1
            wants = self.schedule.wants(self.step, has_state=self.step > 1, tokens=changes.get("tokens", 100))
            slower, own = (self.trace_seconds / 2, self.trace_seconds / 2) if wants else (0.0, self.counted_cost)
            self.now += self.step_seconds + slower + own
            self.spent += slower + own
            seconds = self.step_seconds + slower
            slowed = self.schedule.slowed(seconds) if wants else 0.0
            ended = record(self.step, traced=wants, now=self.now, seconds=seconds, cost=own, slowed=slowed, **changes)
            self.schedule.ended(ended)
            if wants:
                traced.append(self.step)
        return traced


def budgeted(budget: float = 0.005, longest: int = 10**6) -> TraceSchedule:
    return TraceSchedule(trace_every=None, overhead_budget=budget, max_trace_interval=longest, ranks=1)


def fixed(every: int) -> TraceSchedule:
    return TraceSchedule(trace_every=every, overhead_budget=0.005, max_trace_interval=10)


def test_first_trace_is_of_the_first_step_that_begins_with_state() -> None:
    """Usually the second; the first one after a resume; the second one for an optimizer without state."""
    assert Run(budgeted()).go(3) == [2]
    assert budgeted().wants(1, has_state=True, tokens=1)
    assert not budgeted().wants(1, has_state=False, tokens=1)
    assert budgeted().wants(2, has_state=False, tokens=1)


@pytest.mark.parametrize(("every", "traced"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [2, 5]), (0, [2])])
def test_fixed_interval(every: int, traced: list[int]) -> None:
    """`trace_every` counts from the last trace, whatever that costs; 0 traces once."""
    assert Run(fixed(every)).go(6) == traced


def test_on_demand_traces_the_next_step_once() -> None:
    """Also where no further trace would be due."""
    run = Run(fixed(0))
    run.go(5)
    run.schedule.ask()
    assert run.go(5) == [6]


def tries(schedule: TraceSchedule, steps: int, *, cost: float = 0.0, opened: bool = True) -> list[int]:
    """Returns the numbers of the steps whose window is tried, of which none comes to anything."""
    tried = []
    for step in range(2, steps + 2):
        wanted = schedule.wants(step, has_state=True, tokens=100)
        if wanted:
            tried.append(step)
            if not opened:
                schedule.refused(step)
        lost = wanted and opened
        schedule.ended(record(step, traced=False, now=float(step), cost=cost if wanted else 0.0), lost=lost)
    return tried


@pytest.mark.parametrize("schedule", [fixed(0), fixed(1), fixed(5), budgeted()])
def test_window_that_could_not_be_opened_is_tried_again_at_doubling_distances(schedule: TraceSchedule) -> None:
    """Another profiler was active, which costs nothing."""
    assert tries(schedule, 40, opened=False)[:4] == [2, 3, 5, 9]


def test_window_that_can_be_opened_again_is() -> None:
    """The first trace is made up for, and those after it come as always."""
    schedule = fixed(10)
    assert schedule.wants(2, has_state=True, tokens=1)
    schedule.refused(2)
    schedule.ended(record(2, traced=False))
    schedule.ended(record(3, traced=schedule.wants(3, has_state=True, tokens=1)))
    assert [step for step in range(4, 14) if schedule.wants(step, has_state=True, tokens=1)] == [13]


@pytest.mark.parametrize(
    ("every", "tried"), [(0, [2, 3, 5, 9, 17, 33, 65, 129]), (3, [2, 5, 11, 23, 47, 95, 191, 383])]
)
def test_window_that_is_lost_is_tried_again_at_doubling_distances_and_given_up(every: int, tried: list[int]) -> None:
    """Eight in a row; whoever asks for a trace begins anew."""
    schedule = fixed(every)
    assert tries(schedule, 1000) == tried
    assert schedule.given_up
    schedule.ask()
    assert not schedule.given_up
    assert schedule.wants(1002, has_state=True, tokens=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_window_that_is_lost_is_paid_for(ranks: int) -> None:
    """Like any trace, so that the budget is kept, by one rank and by several."""
    schedule = TraceSchedule(trace_every=None, overhead_budget=0.005, max_trace_interval=10**6, ranks=ranks)
    tried = tries(schedule, 40_000, cost=0.5)
    assert 0.5 * len(tried) <= 0.005 * 40_000
    assert len(tried) == 8
    gaps = [later - earlier for earlier, later in pairwise(tried[2:])]
    assert all(1.4 <= later / earlier <= 2.6 for earlier, later in pairwise(gaps)), "each about twice the one before"


def test_trace_after_a_loss_makes_the_picture() -> None:
    """The losses before it are forgotten, and it counts as any other."""
    schedule = fixed(4)
    schedule.ended(record(2, traced=False), lost=True)
    assert [step for step in range(3, 8) if schedule.wants(step, has_state=True, tokens=1)] == [6, 7]
    schedule.ended(record(6, traced=True))
    assert [step for step in range(7, 13) if schedule.wants(step, has_state=True, tokens=1)] == [10, 11, 12]


def test_what_a_window_took_that_no_record_tells_is_paid_too() -> None:
    """A step that ended in an exception: the next trace has to wait for the account."""
    schedule = budgeted()
    schedule.lost(2, 0.3)
    assert not schedule.wants(3, has_state=True, tokens=1)
    schedule.ended(record(3, traced=False, now=200.0, seconds=200.0))
    assert schedule.wants(4, has_state=True, tokens=1)


@pytest.mark.parametrize("budget", [0.001, 0.005, 0.05])
@pytest.mark.parametrize("trace_seconds", [0.05, 1.0, 7.0])
def test_budget_is_kept_and_used(budget: float, trace_seconds: float) -> None:
    """Over a long run memtrace takes its share of wall time, its own cost and the slower steps together, no more."""
    run = Run(budgeted(budget), trace_seconds=trace_seconds)
    traced = run.go(40_000)
    assert run.spent <= budget * run.now + trace_seconds, "at most the first trace is owed"
    assert run.spent >= 0.5 * budget * run.now - trace_seconds, "and all is spent but what is kept for the unseen"
    gaps = [later - earlier for earlier, later in pairwise(traced[1:])]
    assert max(gaps) - min(gaps) <= 1, "traces of a steady run are evenly spaced"


def test_a_traced_step_is_held_against_the_counted_ones_before_it() -> None:
    """What it took longer than their median; nothing where there are none, and nothing where it was quicker."""
    schedule = budgeted()
    assert schedule.slowed(5.0) == 0.0
    for step, seconds in enumerate((1.0, 9.0, 2.0), start=1):
        schedule.ended(record(step, traced=False, seconds=seconds))
    assert schedule.slowed(5.0) == 3.0
    assert schedule.slowed(1.5) == 0.0


def test_what_counted_steps_take_is_on_the_account() -> None:
    """A memtrace that spends the budget on counting traces only as often as it must."""
    run = Run(budgeted(0.005, longest=100), counted_cost=0.006)
    assert run.go(400) == [2, 102, 202, 302]


def test_never_less_than_once_in_the_longest_interval() -> None:
    """However dear a trace is."""
    assert Run(budgeted(0.0, longest=50), trace_seconds=100).go(160) == [2, 52, 102, 152]


@pytest.mark.parametrize("changes", [{"tokens": 200}, {"state": 2 * GIB}, {"high_water": 3 * GIB}])
def test_new_picture_is_traced_sooner(changes: dict[str, int]) -> None:
    """A larger batch, a category that moved, a new high-water mark: as soon as the account is not overdrawn."""
    before = {"high_water": GIB} if "high_water" in changes else {}
    steady, changed = Run(budgeted()), Run(budgeted())
    steady.go(150, **before)
    changed.go(30, **before)
    due = steady.go(500, **before)[0]
    sooner = changed.go(500, **changes)[0]
    assert sooner < due - 5


def test_same_picture_is_no_news() -> None:
    """Equal steps, and changes below a hundredth of the peak, leave the trace valid."""
    traced = record(2, traced=True, high_water=GIB)
    assert not picture_changed(record(3, traced=False, high_water=GIB), traced)
    assert not picture_changed(record(3, traced=False, state=GIB + GIB // 200, high_water=GIB + GIB // 200), traced)
    assert picture_changed(record(3, traced=False, state=GIB + GIB // 50), traced)
    assert picture_changed(record(3, traced=False, high_water=GIB + GIB // 50), traced)


def recorded(
    seconds: float,
    cost: float,
    *,
    passing: float = 0.0,
    budget: float = 0.005,
    longest: int = 10**6,
    steps: int = 20_000,
) -> list[int]:
    """Returns which of equal steps have a record, where that costs so much, and `passing` to pass one over."""
    schedule = budgeted(budget, longest)
    numbers, left = [], 0
    for step in range(1, steps + 1):
        if left:
            left -= 1
            continue
        traced = schedule.wants(step, has_state=True, tokens=100)
        passed = passing * (step - numbers[-1] - 1) if numbers else 0.0
        ended = record(step, traced=traced, now=step * seconds, seconds=seconds, cost=cost + passed)
        schedule.ended(ended, skipped_seconds=passed)
        numbers.append(step)
        left = schedule.steps_to_pass()
    return numbers


def test_an_ordinary_step_always_has_a_record() -> None:
    """As long as records alone stay within the budget: 0.15 ms of 60 ms."""
    assert recorded(0.06, 0.00015, steps=2000) == list(range(1, 2001))


def test_records_of_short_steps_take_half_of_the_budget() -> None:
    """75 us a record, steps of 0.5 ms: one in 100, after those at the beginning."""
    numbers = recorded(0.0005, 0.000075)
    assert numbers[:32] == list(range(1, 33))
    assert {later - earlier for earlier, later in pairwise(numbers[31:])} <= {100, 101}, "the clock is a float"


def test_what_passing_over_takes_comes_first() -> None:
    """Half of 0.75 us a step for counting: records twice as far apart; where nothing is left, once a second."""
    numbers = recorded(0.0005, 0.000075, passing=0.000000375)
    assert {later - earlier for earlier, later in pairwise(numbers[34:])} <= {200, 201}
    numbers = recorded(0.0005, 0.000075, passing=0.000002)
    assert {later - earlier for earlier, later in pairwise(numbers[34:])} <= {2000, 2001}


def test_there_is_a_record_every_second_and_for_every_due_trace() -> None:
    """However dear a record is."""
    numbers = recorded(0.001, 0.1, budget=0.0)
    assert {later - earlier for earlier, later in pairwise(numbers[31:])} == {1000}
    numbers = recorded(0.001, 0.1, budget=0.0, longest=64, steps=1000)
    assert numbers[32:] == [65, *range(129, 1000, 64)]


def test_the_largest_batch_with_a_record_is_told() -> None:
    """A larger one is not skipped."""
    schedule = budgeted()
    schedule.ended(record(1, traced=False, tokens=100))
    schedule.ended(record(2, traced=False, tokens=50))
    assert schedule.largest_tokens == 100

"""The budget is the job's: what all ranks together lose to traces, since each of them waits for the slowest."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from memtrace.record.breakdown import BatchShape, StepRecord
from memtrace.tracing.schedule import TraceSchedule

BUDGET = 0.005
ALLOWED = 0.0055
STEPS = 20_000
TRACE_SECONDS = 0.5
"""Half of it makes the step itself longer, half of it follows the step."""

Draw = Callable[[random.Random], float]


class Job:
    """Data-parallel training: a step of all ranks takes as long as that of the slowest.

    Args:
        ranks: processes.
        seconds: draws what a step takes without a trace, once for all.
        tokens: draws the tokens of one rank's batch.
        trace: draws what a trace of one rank takes.
        every: steps from one record to the next; those in between are skipped.
        told: whether the schedules know how many ranks there are.
    """

    def __init__(self, ranks: int, seconds: Draw, tokens: Draw, trace: Draw, *, every: int = 1, told: bool) -> None:
        self.schedules = [
            TraceSchedule(
                trace_every=None, overhead_budget=BUDGET, max_trace_interval=10_000, ranks=ranks if told else None
            )
            for _ in range(ranks)
        ]
        self._draws = seconds, tokens, trace
        self._every = every
        self.traced: list[list[int]] = [[] for _ in range(ranks)]
        """The numbers of the traced steps of each rank."""
        self.with_traces = self.without = 0.0

    def run(self, steps: int = STEPS) -> float:
        """Returns by which share the job is slower for it."""
        draw = random.Random(0)
        seconds, tokens, trace = self._draws
        for step in range(1, steps + 1):
            base = seconds(draw)
            self.without += base
            if step > 2 and step % self._every:
                self.with_traces += base
                continue
            lengths = [round(tokens(draw)) for _ in self.schedules]
            wants = [
                schedule.wants(step, has_state=step > 1, tokens=length)
                for schedule, length in zip(self.schedules, lengths, strict=True)
            ]
            costs = [trace(draw) if wanted else 0.0 for wanted in wants]
            slower = max(costs)
            self.with_traces += base + slower
            for rank, (schedule, wanted) in enumerate(zip(self.schedules, wants, strict=True)):
                own = costs[rank] / 2 + 0.0002
                record = StepRecord(
                    step=step,
                    rank=rank,
                    device="cpu",
                    traced=wanted,
                    unix_seconds=self.with_traces,
                    self_seconds=own,
                    slowed_seconds=schedule.slowed(base + slower - costs[rank] / 2) if wanted else 0.0,
                    step_seconds=base + slower,
                    batch=BatchShape(
                        shape=(1, lengths[rank]), tokens=lengths[rank], largest_micro_batch_tokens=lengths[rank]
                    ),
                )
                schedule.ended(record)
                if wanted:
                    self.traced[rank].append(step)
        return self.with_traces / self.without - 1


def constant(value: float) -> Draw:
    return lambda _: value


def jitter(value: float, share: float) -> Draw:
    return lambda draw: value * (1 + draw.uniform(-share, share))


def lengths(draw: random.Random) -> float:
    return draw.lognormvariate(6.5, 0.6)


JOBS = {
    "constant": (constant(1.0), constant(1000), constant(TRACE_SECONDS)),
    "varying lengths": (jitter(1.0, 0.02), lengths, jitter(TRACE_SECONDS, 0.1)),
    "jitter": (jitter(1.0, 0.3), lengths, jitter(TRACE_SECONDS, 0.5)),
}


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize(
    ("ranks", "every", "told"), [(1, 1, True), (1, 1, False), (8, 4, True), (64, 16, False), (512, 64, True)]
)
def test_all_ranks_together_keep_the_budget(ranks: int, every: int, kind: str, told: bool) -> None:
    """However many they are; and every rank traces, soon for the first time and often enough."""
    job = Job(ranks, *JOBS[kind], every=every, told=told)
    slower = job.run()
    assert slower <= ALLOWED
    assert {traced[0] for traced in job.traced} == {2}
    assert min(len(traced) for traced in job.traced) >= 20
    assert min(traced[1] for traced in job.traced) <= 1024


def test_ranks_with_a_record_of_every_step_keep_the_budget() -> None:
    """Each has a chance to trace in every step: larger batches come to each of them at other times."""
    job = Job(64, *JOBS["varying lengths"], told=True)
    assert job.run(3000) <= ALLOWED + TRACE_SECONDS / 3000, "the first trace is owed"
    assert len({step for traced in job.traced for step in traced}) == max(map(len, job.traced))


@pytest.mark.long
def test_a_long_job_with_a_record_of_every_step_keeps_the_budget() -> None:
    """Of 20,000 steps, in which each of 64 ranks may trace, the first trace is not an exception any more."""
    job = Job(64, *JOBS["varying lengths"], told=True)
    assert job.run() <= ALLOWED
    assert {traced[0] for traced in job.traced} == {2}
    assert min(len(traced) for traced in job.traced) >= 20


def test_ranks_of_different_speed_trace_in_steps_of_each_other() -> None:
    """A rank whose traces are dearer traces in some of the steps in which a rank with cheap ones does."""
    cheap, dear = (Job(2, constant(1.0), constant(1000), constant(seconds), told=True) for seconds in (0.1, 0.4))
    cheap.run()
    dear.run()
    assert set(dear.traced[0]) < set(cheap.traced[0])


def test_steps_are_numbered_as_the_loop_does() -> None:
    """Also where it counts in fours from one: the first step after a multiple is traced."""
    schedule = TraceSchedule(trace_every=None, overhead_budget=0.5, max_trace_interval=64, ranks=2)
    traced = []
    for step in range(1, 1000, 4):
        if schedule.wants(step, has_state=True, tokens=1):
            traced.append(step)
        schedule.ended(
            StepRecord(step=step, rank=0, device="cpu", traced=step in traced, unix_seconds=step, self_seconds=100.0)
        )
    assert traced == [1, *range(65, 1000, 64)]


def test_a_step_that_several_ranks_trace_is_not_skipped() -> None:
    """However few records the budget allows."""
    schedule = TraceSchedule(trace_every=None, overhead_budget=BUDGET, max_trace_interval=512, ranks=8)
    recorded, traced, left = [], [], 0
    for step in range(1, 5000):
        if left:
            left -= 1
            continue
        wanted = schedule.wants(step, has_state=True, tokens=1)
        recorded.append(step)
        traced += [step] if wanted else []
        schedule.ended(
            StepRecord(
                step=step,
                rank=0,
                device="cpu",
                traced=wanted,
                unix_seconds=step * 0.0005,
                self_seconds=0.0001 if not wanted else 0.1,
                step_seconds=0.0005,
            )
        )
        left = schedule.steps_to_pass()
    assert traced == [1, *range(512, 5000, 512)]
    assert len(recorded) < 200

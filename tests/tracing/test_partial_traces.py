"""Steps that allocate more often than a source has room for."""

from __future__ import annotations

from small_training import EVERY_STEP, loss_of, make

from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Moment
from memtrace.record.limitations import Unseen
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

MICRO_BATCHES, EACH = 4, 100


class Bounded(CpuEvents):
    """A source with room for so many allocations, whose counter has each micro batch allocate `EACH` times."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.counted, self.opened = room, 0, list[int | None]()

    def fits(self, allocations: int) -> bool:
        return allocations <= self.room

    def open(self, expected_allocations: int | None = None) -> bool:
        self.opened.append(expected_allocations)
        return super().open(expected_allocations)

    def reading(self) -> AllocatorReading | None:
        return AllocatorReading(allocated_bytes=0, reserved_bytes=0, allocations=self.counted)


def run(source: Bounded, steps: list[int]) -> Tracer:
    model, optimizer = make()
    with Tracer(model, optimizer, EVERY_STEP, source=source) as tracer:
        for micro_batches in steps:
            for _ in range(micro_batches):
                loss = loss_of(model)
                source.counted += EACH
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer


def test_a_step_with_room_is_traced_whole() -> None:
    """And the source is told how often it will allocate."""
    source = Bounded(MICRO_BATCHES * EACH)
    tracer = run(source, [MICRO_BATCHES] * 3)
    assert [record.traced_from_micro_batch for record in tracer.history] == [None] * 3
    assert source.opened == [None, MICRO_BATCHES * EACH, MICRO_BATCHES * EACH]


def test_a_step_without_room_is_traced_from_its_last_micro_batch_on() -> None:
    """Marked so; the categories add up, and all moments are there."""
    tracer = run(Bounded(EACH), [MICRO_BATCHES] * 3)
    assert [record.traced for record in tracer.history] == [True] * 3
    assert [record.traced_from_micro_batch for record in tracer.history] == [None, MICRO_BATCHES, MICRO_BATCHES]
    for record in tracer.history:
        assert set(record.moments) == set(Moment)
        assert all(breakdown.total_bytes == breakdown.allocated_bytes for breakdown in record.moments.values())


def test_a_shorter_step_than_the_one_before_is_counted() -> None:
    """Its last micro batch was not known to be the last; the next step goes by it."""
    tracer = run(Bounded(EACH), [MICRO_BATCHES, 2, 2])
    assert [record.traced for record in tracer.history] == [True, False, True]
    assert tracer.history[-1].traced_from_micro_batch == 2


def test_a_micro_batch_without_room_is_not_traced_and_said() -> None:
    """Once; training and counting go on."""
    tracer = run(Bounded(EACH - 1), [MICRO_BATCHES] * 4)
    assert [record.traced for record in tracer.history] == [True, False, False, False]
    assert tracer.snapshot().not_seen == (Unseen.TRACE,)

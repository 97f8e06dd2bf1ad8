"""Failures that the device's allocator tells of, with a hand-made list of segments in the allocator's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_scenes import CASES, GIB, MIB, snapshot_of
from greedy_training import GreedyModel

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.window import TraceWindow
from memtrace.guard import Guard
from memtrace.oom import watch as watch_module
from memtrace.oom.watch import LOOK_SECONDS, OomWatch
from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Phase
from memtrace.record.oom.report import OomReport, RemedyKind, Witness
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.sources.events import Window

CASE = CASES[0]


class Counters:
    """A source that has the counters of the case, and never a window."""

    is_open = False

    def open(self) -> bool:
        return False

    def close(self) -> Window:
        raise AssertionError("no window is ever open")

    def abandon(self) -> None:
        pass

    def interrupted(self) -> bool:
        return False

    def hears_this_thread(self) -> bool:
        return True

    def reading(self) -> AllocatorReading:
        return AllocatorReading(
            allocated_bytes=CASE.live_bytes,
            reserved_bytes=CASE.live_bytes + GIB,
            requested_bytes=CASE.live_bytes,
            ooms=1,
        )


class Scene:
    """An OomWatch of a CUDA device, with what it publishes."""

    def __init__(self) -> None:
        self.published: list[OomReport] = []
        self.now = 1000.0
        self.step: StepInProgress | None = StepInProgress(number=7, read=lambda: None)
        self.step.forward_begins(torch.zeros(8, 4))
        self.step.before_forward = AllocatorReading(
            allocated_bytes=0, reserved_bytes=0, requested_bytes=CASE.before_forward
        )
        self.model = GreedyModel()
        source = Counters()
        guard = Guard(lambda: None, strict=True)
        scan = Scan(self.model, torch.optim.AdamW(self.model.parameters()))
        ledger = Ledger(torch.device("cuda", 0))
        window = TraceWindow(
            model=self.model,
            scan=scan,
            source=source,
            ledger=ledger,
            guard=guard,
            current_step=lambda: self.step,
        )
        self.watch = OomWatch(
            model=self.model,
            scan=scan,
            source=source,
            ledger=ledger,
            window=window,
            guard=guard,
            current_step=lambda: self.step,
            snapshot=lambda: Snapshot(identity=RunIdentity(run_name="llama", device="cuda:0")),
            publish=self._publish,
            clock=lambda: self.now,
        )

    def _publish(self, report: OomReport) -> None:
        self.published.append(report)

    @property
    def told(self) -> list[tuple[int | None, bool]]:
        """Step of each report that was published, and whether it was pending."""
        return [(report.step, report.request.pending) for report in self.published]

    def begin_step(self, number: int) -> None:
        self.step = StepInProgress(number=number, read=lambda: None)

    def allocator_says(self, device: int = 0, segment: int = 2 * GIB, free: int = 100 * MIB) -> None:
        self.watch._allocator_says(device, segment, free)

    def raises(self, text: str = "CUDA out of memory. Tried to allocate 2.00 GiB.") -> Any:
        error = torch.OutOfMemoryError(text)
        self.watch.raised(error)
        return error


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(watch_module, "segments", lambda: snapshot_of(CASE))
    return Scene()


def test_report_is_made_at_the_moment_of_the_failure(scene: Scene) -> None:
    """The allocator's word has the segment and what was free, and every live block is there."""
    scene.allocator_says()
    (report,) = scene.published
    assert report.request.witness is Witness.ALLOCATOR
    assert report.request.pending
    assert report.request.requested_bytes is None
    assert report.request.segment_bytes == 2 * GIB
    assert report.request.free_bytes == 100 * MIB
    assert report.request.phase is Phase.FORWARD
    assert report.composition.complete
    assert report.composition.total_bytes == CASE.live_bytes
    assert report.fragmentation is not None


def test_exception_completes_the_report(scene: Scene) -> None:
    """The exception that follows adds its message to the same report: there is one for one failure."""
    scene.allocator_says()
    error = scene.raises()
    first, second = scene.published
    assert not second.request.pending
    assert second.request.witness is Witness.ALLOCATOR
    assert second.unix_seconds == first.unix_seconds
    assert second.composition == first.composition
    assert second.request.message.startswith("OutOfMemoryError: CUDA out of memory")
    assert len(error.__notes__) == 1
    scene.watch.raised(error)
    assert len(scene.published) == 2


def test_report_says_what_was_asked_for_beside_the_segment(scene: Scene) -> None:
    """Where an exception says less than the segment that the allocator wanted, remedies use what it says."""
    scene.allocator_says(segment=20 * MIB, free=10 * MIB)
    scene.raises("CUDA out of memory. Tried to allocate 3.00 MiB. GPU 0 has a total capacity of 80 GiB.")
    first, second = scene.published
    assert (first.request.requested_bytes, first.request.segment_bytes) == (None, 20 * MIB)
    assert (second.request.requested_bytes, second.request.segment_bytes) == (3 * MIB, 20 * MIB)
    before = {remedy.kind: remedy.saved_bytes for remedy in first.remedies}
    after = {remedy.kind: remedy.saved_bytes for remedy in second.remedies}
    halved = RemedyKind.SMALLER_MICRO_BATCH
    assert before[halved] - after[halved] == 17 * MIB // 2


@pytest.mark.parametrize("told", [True, False], ids=["allocator told", "exception alone"])
def test_segment_in_the_message_is_not_taken_for_the_request(scene: Scene, told: bool) -> None:
    """CUDA's allocator words 20 MiB for every request between 1 and 10: what was asked for is not known."""
    if told:
        scene.allocator_says(segment=20 * MIB)
    scene.raises("CUDA out of memory. Tried to allocate 20.00 MiB.")
    request = scene.published[-1].request
    assert (request.requested_bytes, request.segment_bytes) == (None, 20 * MIB)


def test_large_request_is_its_segment(scene: Scene) -> None:
    """Above 10 MiB the two differ by less than 2 MiB."""
    scene.allocator_says(segment=2 * GIB)
    scene.raises("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert scene.published[-1].request.requested_bytes == 2 * GIB


def test_failure_of_another_device_is_not_this_tracers(scene: Scene) -> None:
    """Each tracer watches one device."""
    scene.allocator_says(device=1)
    assert scene.published == []


def test_exception_without_the_allocators_word_is_reported_too(scene: Scene) -> None:
    """A driver that runs out of memory raises without asking the caching allocator."""
    scene.raises("CUDA out of memory. Tried to allocate 512.00 MiB.")
    (report,) = scene.published
    assert not report.request.pending
    assert report.request.witness is Witness.EXCEPTION
    assert report.request.requested_bytes == 512 * MIB
    assert report.request.segment_bytes is None


def test_failures_that_torch_catches_cost_one_look_in_some_seconds(scene: Scene) -> None:
    """A convolution that tries workspaces in every step is looked into once in 10 s, and never counts."""
    for number in range(7, 27):
        scene.begin_step(number)
        for _ in range(10):
            scene.allocator_says()
    assert scene.told == [(7, True)]
    scene.now += LOOK_SECONDS
    scene.allocator_says()
    assert scene.told == [(7, True), (26, True)]


def test_failure_that_was_not_looked_into_is_reported_by_its_exception(scene: Scene) -> None:
    """The exception that follows has a report of its own then, with what the allocator had told."""
    scene.allocator_says()
    scene.allocator_says(segment=4 * GIB, free=7 * MIB)
    scene.raises("CUDA out of memory. Tried to allocate 3.99 GiB.")
    assert scene.told == [(7, True), (7, False)]
    request = scene.published[-1].request
    assert request.witness is Witness.EXCEPTION
    assert (request.segment_bytes, request.free_bytes) == (4 * GIB, 7 * MIB)


def test_failures_that_an_exception_follows_are_each_looked_into(scene: Scene) -> None:
    """Where a loop tries ever smaller batches, each failure has what was live at its moment."""
    for number in range(7, 10):
        scene.begin_step(number)
        scene.allocator_says()
        scene.raises()
    assert scene.told == [(7, True), (7, False), (8, True), (8, False), (9, True), (9, False)]
    assert {report.request.witness for report in scene.published} == {Witness.ALLOCATOR}


def test_exception_of_a_later_step_is_not_mixed_up_with_a_failure_that_was_handled(scene: Scene) -> None:
    """What the allocator told in an earlier step was got over: the exception has a report of its own."""
    scene.allocator_says()
    scene.begin_step(8)
    scene.raises()
    assert scene.told == [(7, True), (8, False)]
    assert scene.published[-1].request.segment_bytes is None


def test_exception_about_something_else_makes_no_failure_of_a_caught_one(scene: Scene) -> None:
    """After any exception the allocator's word is forgotten."""
    scene.allocator_says()
    scene.watch.raised(ValueError())
    scene.raises()
    assert scene.told == [(7, True), (7, False)]
    assert scene.published[-1].request.segment_bytes is None


def test_restart_completes_what_the_allocator_told(scene: Scene) -> None:
    """auto_find_batch_size begins again: nobody shows the exception, and the step is given up."""
    scene.allocator_says()
    scene.watch.restarted()
    assert scene.told == [(7, True), (7, False)]
    assert scene.published[1].request.witness is Witness.ALLOCATOR
    assert scene.published[1].unix_seconds == scene.published[0].unix_seconds


def test_restart_after_a_known_failure_adds_nothing(scene: Scene) -> None:
    """auto_find_batch_size begins again after the exception was seen."""
    scene.allocator_says()
    scene.raises()
    scene.watch.restarted()
    assert scene.told == [(7, True), (7, False)]

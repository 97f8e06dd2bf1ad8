"""Failures that the device's allocator tells of, with a hand-made list of segments in the allocator's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_scenes import CASES, GIB, MIB, snapshot_of
from greedy_training import GreedyModel

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.breakdown import AllocatorReading
from memtrace.categories import Phase
from memtrace.guard import Guard
from memtrace.oom import watch as watch_module
from memtrace.oom.watch import MAX_REPORTS_A_STEP, OomWatch
from memtrace.oom_report import OomReport, Witness
from memtrace.snapshot import RunIdentity, Snapshot
from memtrace.sources.events import Window
from memtrace.steps import StepInFlight
from memtrace.tracing import TraceWindow

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
        self.published: list[tuple[OomReport, bool]] = []
        self.step: StepInFlight | None = StepInFlight(number=7, read=lambda: None)
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
        )

    def _publish(self, report: OomReport, *, again: bool) -> None:
        self.published.append((report, again))

    def allocator_says(self, device: int = 0, requested: int = 2 * GIB, free: int = 100 * MIB) -> None:
        self.watch._allocator_says(device, requested, free)

    def raises(self, text: str = "CUDA out of memory. Tried to allocate 2.00 GiB.") -> Any:
        error = torch.OutOfMemoryError(text)
        self.watch.raised(error)
        return error


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(watch_module, "segments", lambda: snapshot_of(CASE))
    return Scene()


def test_report_is_made_at_the_moment_of_the_failure(scene: Scene) -> None:
    """The allocator's word has the exact request and what was free, and every live block is there."""
    scene.allocator_says()
    ((report, again),) = scene.published
    assert not again
    assert report.request.witness is Witness.ALLOCATOR
    assert report.request.requested_bytes == 2 * GIB
    assert report.request.free_bytes == 100 * MIB
    assert report.request.phase is Phase.FORWARD
    assert report.composition.complete
    assert report.composition.total_bytes == CASE.live_bytes
    assert report.fragmentation is not None


def test_exception_completes_the_report(scene: Scene) -> None:
    """The exception that follows adds its message to the same report: there is one for one failure."""
    scene.allocator_says()
    error = scene.raises()
    (first, _), (second, again) = scene.published
    assert again
    assert second.unix_seconds == first.unix_seconds
    assert second.composition == first.composition
    assert second.request.message.startswith("OutOfMemoryError: CUDA out of memory")
    assert len(error.__notes__) == 1
    scene.watch.raised(error)
    assert len(scene.published) == 2


def test_failure_of_another_device_is_not_this_tracers(scene: Scene) -> None:
    """Each tracer watches one device."""
    scene.allocator_says(device=1)
    assert scene.published == []


def test_exception_without_the_allocators_word_is_reported_too(scene: Scene) -> None:
    """A driver that runs out of memory raises without asking the caching allocator."""
    scene.raises("CUDA out of memory. Tried to allocate 512.00 MiB.")
    ((report, again),) = scene.published
    assert not again
    assert report.request.witness is Witness.EXCEPTION
    assert report.request.requested_bytes == 512 * MIB


def test_failures_of_one_step_are_bounded(scene: Scene) -> None:
    """A convolution that tries many workspaces costs a few reports a step; the next step begins anew."""
    for _ in range(10):
        scene.allocator_says()
    assert len(scene.published) == MAX_REPORTS_A_STEP
    scene.step = StepInFlight(number=8, read=lambda: None)
    scene.allocator_says()
    assert len(scene.published) == MAX_REPORTS_A_STEP + 1


def test_exception_of_a_later_step_is_not_mixed_up_with_a_failure_that_was_handled(scene: Scene) -> None:
    """What the allocator told in an earlier step was got over: the exception has a report of its own."""
    scene.allocator_says()
    scene.step = StepInFlight(number=8, read=lambda: None)
    scene.raises()
    assert [(report.step, again) for report, again in scene.published] == [(7, False), (8, False)]


def test_restart_after_a_known_failure_adds_nothing(scene: Scene) -> None:
    """auto_find_batch_size begins again after the allocator has told."""
    scene.allocator_says()
    scene.watch.restarted()
    assert len(scene.published) == 1

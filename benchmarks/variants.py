"""What a training run is measured with: nothing, memtrace, and the tools that one would use in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from benchmarks.workloads import Training
from memtrace import MemoryTracer, StepRecord, TracerConfig


class Watch(Protocol):
    """What watches one training run over all its blocks."""

    def resume(self, away_seconds: float) -> None:
        """Notes that the run goes on after others have had their turn."""

    def traced_steps(self) -> int:
        """Returns how many steps were traced so far."""


class Nobody:
    """Watches nothing."""

    def resume(self, away_seconds: float) -> None:
        """Does nothing."""

    def traced_steps(self) -> int:
        """Returns 0."""
        return 0


class Memtrace:
    """memtrace on a training run, as its user has it."""

    def __init__(self, tracer: MemoryTracer) -> None:
        self._tracer = tracer
        self._traced = 0
        tracer.add_listener(self._count)  # asked between any two steps, a snapshot would empty the processor's caches

    def resume(self, away_seconds: float) -> None:
        """Takes the turns of the others out of the wall time that the budget of traces is a share of.

        Otherwise each turn would earn more traces than a run by itself does. There is no public way to say so, and a
        real run needs none.
        """
        schedule = self._tracer._schedule
        if schedule._previous_end is not None:
            schedule._previous_end += away_seconds

    def traced_steps(self) -> int:
        """Returns how many steps were traced so far."""
        return self._traced

    def _count(self, record: StepRecord) -> None:
        self._traced += record.traced


@contextmanager
def _nobody(training: Training, log_dir: Path) -> Iterator[Watch]:
    yield Nobody()


def _memtrace(**settings: object) -> Callable[[Training, Path], AbstractContextManager[Watch]]:
    @contextmanager
    def attach(training: Training, log_dir: Path) -> Iterator[Watch]:
        config = TracerConfig.from_settings({"log_dir": log_dir, "quiet": True, **settings})
        with MemoryTracer(training.model, training.optimizer, config) as tracer:
            yield Memtrace(tracer)

    return attach


def _unwatched(training: Training) -> AbstractContextManager[object]:
    return nullcontext()


def _profiler(*, details: bool) -> Callable[[Training], AbstractContextManager[object]]:
    def around(training: Training) -> AbstractContextManager[object]:
        activities = [ProfilerActivity.CPU]
        if next(training.model.parameters()).is_cuda:
            activities.append(ProfilerActivity.CUDA)
        return profile(activities=activities, profile_memory=True, record_shapes=details, with_stack=details)

    return around


def _memtracker(training: Training) -> AbstractContextManager[object]:
    tracker = MemTracker()
    tracker.track_external(training.model, training.optimizer)
    return tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the training."""

    name: str
    title: str
    attach: Callable[[Training, Path], AbstractContextManager[Watch]] = _nobody
    """Begins to watch, for as long as the measuring lasts; the path is for what it writes."""
    around_block: Callable[[Training], AbstractContextManager[object]] = _unwatched
    """What is on while a block of steps runs; starting and stopping it is counted."""
    around_step: Callable[[Training], AbstractContextManager[object]] = _unwatched
    """The same for each step, where the tool does not take a second one."""
    leaves_garbage: bool = False
    """Whether what it has recorded is collected after each block, outside of what is measured: else the plain training
    pays for a part of it."""
    share: int = 1
    """Of the time that a workload is measured for, beside the shares of the others: a small difference needs most."""

    @property
    def surrounds_blocks(self) -> bool:
        """Whether something is started and stopped around each block."""
        return self.around_block is not _unwatched


NOTHING = Variant(name="nothing", title="nothing")

VARIANTS: Sequence[Variant] = (
    Variant(name="control", title="nothing again", share=2),
    Variant(name="default", title="memtrace, default settings", attach=_memtrace(), share=8),
    Variant(name="every_step", title="memtrace, every step traced", attach=_memtrace(trace_every=1), share=8),
    Variant(
        name="profiler",
        title="torch.profiler, profile_memory",
        around_block=_profiler(details=False),
        leaves_garbage=True,
    ),
    Variant(
        name="profiler_details",
        title="the same with shapes and stacks",
        around_block=_profiler(details=True),
        leaves_garbage=True,
    ),
    Variant(name="memtracker", title="torch's MemTracker", around_step=_memtracker, leaves_garbage=True),
)
"""What is measured, each beside `NOTHING`."""

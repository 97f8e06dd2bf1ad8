"""From a failed allocation to its report: what is read at that moment, for one tracer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from memtrace.allocator.recording import AllocatorRecording
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.window import TraceWindow
from memtrace.guard import Guard
from memtrace.oom.advice import ModelFacts
from memtrace.oom.allocator_answer import answer
from memtrace.oom.composition import Holding, StepFacts, from_blocks, from_ledger, from_timeline
from memtrace.oom.failure import failing_module, first_line, is_pool_segment, out_of_memory, requested_bytes
from memtrace.oom.fragmentation import parse_fragmentation
from memtrace.oom.holders import module_names, repeated_blocks
from memtrace.oom.markdown import headline
from memtrace.oom.scene import Scene, describe, with_request
from memtrace.record.categories import Phase
from memtrace.record.oom.report import FailedRequest, Fragmentation, OomReport, Witness
from memtrace.record.snapshot import Snapshot
from memtrace.sources.cuda.allocator import live_blocks, segments, stream_memory
from memtrace.sources.events import EventSource
from memtrace.sources.failures import FAILURES

LOOK_SECONDS = 10.0
"""For so long after the allocator has told of a failure that no exception followed, further ones are not looked into: a
convolution may fail in every step, each time with a smaller workspace, and then succeed."""


class Publish(Protocol):
    """What is done with a report."""

    def __call__(self, report: OomReport) -> Path | None:
        """Files a report and returns where. One that is no longer pending replaces the pending one of the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notice:
    """What the allocator told last, as long as no exception has followed."""

    step: int | None
    request: FailedRequest
    report: OomReport | None
    """What was live then; None where that was not looked into."""


class OomWatch:
    """Looks at what is live when an allocation has failed.

    Allocates nothing on the device and does not synchronise it. One failure is told twice on a CUDA device: by the
    allocator, when everything is still there, and by the exception, which says what was asked for and where; the second
    completes the first report. The allocator's word alone is no failure of the run, since torch catches such exceptions
    where it can go on with less: its report is pending. What was told last is dropped with the next word of the
    allocator, and with an exception of any kind.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        scan: Scan,
        source: EventSource,
        ledger: Ledger,
        window: TraceWindow,
        guard: Guard,
        current_step: Callable[[], StepInProgress | None],
        snapshot: Callable[[], Snapshot],
        publish: Publish,
        recording: Callable[[], AllocatorRecording | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._scan = model, scan
        self._source, self._ledger, self._window, self._guard = source, ledger, window, guard
        self._current_step, self._snapshot, self._publish = current_step, snapshot, publish
        self._clock, self._recording = clock, recording
        self._replayed: AllocatorRecording | None = None
        """The recording that was replayed last: once each, in a loop that fails again and again."""
        self._notice: _Notice | None = None
        self._next_look = -math.inf
        """When the allocator's word is looked into again, by the clock."""
        self._failed_step: int | None = None
        """The last step with a report that is not pending."""
        self._note: str | None = None
        """What was added to the last exception."""

    def subscribe(self) -> Callable[[], None]:
        """Learns from now on of failures that nobody hands over; returns what ends that."""
        return FAILURES.subscribe(self._allocator_says, self._crashed, cuda=self._ledger.device.type == "cuda")

    def raised(self, error: BaseException) -> None:
        """Reports an exception, once, where it says that the device's memory has run out."""
        cause = out_of_memory(error, self._ledger.device.type)
        if self._note is not None and self._note in getattr(error, "__notes__", ()):
            return
        step, notice = self._current_step(), self._taken_notice()
        if cause is None:
            return
        told = self._failed(Witness.EXCEPTION, step) if notice is None else notice.request
        asked_for, segment = requested_bytes(cause), told.segment_bytes
        if self._ledger.device.type == "cuda" and is_pool_segment(asked_for) and segment in (None, asked_for):
            asked_for, segment = None, asked_for
        request = replace(
            told,
            witness=Witness.EXCEPTION,
            requested_bytes=asked_for,
            segment_bytes=segment,
            module=failing_module(cause, self._model),
            message=first_line(cause),
            pending=False,
        )
        report, path = self._settle(request, step, None if notice is None else notice.report)
        self._note = f"memtrace: {headline(report)}{'' if path is None else f'. Report: {path}'}"
        error.add_note(self._note)

    def restarted(self) -> None:
        """Reports the step in progress, which was given up for lack of memory, unless that failure is known."""
        step, notice = self._current_step(), self._taken_notice()
        if step is None or self._failed_step == step.number:
            return
        if notice is None:
            self._settle(self._failed(Witness.RESTART, step), step, None)
        else:
            self._settle(replace(notice.request, witness=Witness.RESTART, pending=False), step, notice.report)

    def _allocator_says(self, device_index: int, requested: int, free: int) -> None:
        if device_index == self._ledger.device.index:
            self._guard.run(self._allocation_failed, requested, free)

    def _allocation_failed(self, requested: int, free: int) -> None:
        step = self._current_step()
        failed = self._failed(Witness.ALLOCATOR, step)
        request = replace(failed, segment_bytes=requested, free_bytes=free, pending=True)
        report = None
        if self._clock() >= self._next_look:
            self._next_look = self._clock() + LOOK_SECONDS
            report = self._look(request, step)
            self._publish(report)
        self._notice = _Notice(step=_number(step), request=request, report=report)

    def _failed(self, witness: Witness, step: StepInProgress | None) -> FailedRequest:
        """Returns what is known of a failed allocation at once: who tells of it, and where the training is."""
        evaluation = step is None and not self._model.training
        return FailedRequest(witness=witness, phase=_phase(step), evaluation=evaluation)

    def _crashed(self, error: BaseException) -> None:
        self._guard.run(self.raised, error)

    def _taken_notice(self) -> _Notice | None:
        """Forgets what the allocator told last, and returns it where it was told in the step in progress."""
        notice, self._notice = self._notice, None
        return notice if notice is not None and notice.step == _number(self._current_step()) else None

    def _settle(
        self, request: FailedRequest, step: StepInProgress | None, known: OomReport | None
    ) -> tuple[OomReport, Path | None]:
        """Publishes the report of a failure that is one of the run: the known one, completed, or a new one."""
        self._failed_step, self._next_look = _number(step), -math.inf
        if known is None:
            report = self._look(request, step)
        else:
            report = with_request(known, replace(request, witness=Witness.ALLOCATOR), self._facts())
        recording = self._recording()
        if recording is not None and recording is not self._replayed:
            self._replayed, device = recording, report.device_memory
            free = None if device is None else device.free_bytes
            found = self._guard.run(answer, recording, request, free)  # a fault there leaves the rest of the report
            report = replace(report, allocator_answer=found)
        return report, self._publish(report)

    def _look(self, request: FailedRequest, step: StepInProgress | None) -> OomReport:
        """Returns the report of what is live now."""
        reading = self._source.reading()
        names = module_names(self._model, self._scan.optimizers, self._ledger.device)
        self._scan.claim_persistent(self._ledger)
        listed = segments() if self._ledger.device.type == "cuda" else None
        if listed is not None:
            holdings, estimated, fragmentation = self._on_cuda(step, listed)
            complete = True
        else:  # a CPU, or an allocator of CUDA that does not list its blocks
            holdings, complete = self._on_cpu(step)
            estimated, fragmentation = False, None
        return describe(
            Scene(
                unix_seconds=time.time(),
                request=request,
                snapshot=self._snapshot(),
                holdings=holdings,
                complete=complete,
                estimated=estimated,
                names=names,
                facts=self._facts(),
                step=_number(step),
                batch=None if step is None else step.batch(),
                allocator=reading,
                fragmentation=fragmentation,
            )
        )

    def _on_cuda(self, step: StepInProgress | None, listed: Sequence[Any]) -> tuple[list[Holding], bool, Fragmentation]:
        index = self._ledger.device.index
        known = [*self._ledger.live(), *self._window.saved]
        before = None if step is None else step.before_forward
        facts = StepFacts(
            phase=_phase(step),
            requested_before_forward=None if before is None else before.requested_bytes,
            micro_batches=0 if step is None else step.micro_batches,
            traced=self._window.is_open,
        )
        blocks, hidden = live_blocks(listed, index), self._scan.hidden()
        sizes, streams = self._scan.workspace_sizes(), stream_memory(listed, index)
        holdings, estimated = from_blocks(blocks, known, hidden, facts, sizes, streams=streams)
        held = {holding.address: holding.key for holding in holdings}
        return holdings, estimated, parse_fragmentation(listed, index, held)

    def _on_cpu(self, step: StepInProgress | None) -> tuple[list[Holding], bool]:
        """Reads an open window, which ends it: the step that it was for has failed."""
        if step is not None and self._window.is_open:
            timeline = self._window.close()
            if timeline is not None:
                return from_timeline(timeline, step.begin_ns, step.phase), True
        return from_ledger(self._ledger.live()), False

    def _facts(self) -> ModelFacts:
        return ModelFacts(
            checkpointing=_checkpoints(self._model),
            repeated_blocks=repeated_blocks(self._model),
            sharded=any(engine.shards for engine in self._scan.engines),
            foreach=any(_works_on_lists(optimizer, self._ledger.device) for optimizer in self._scan.optimizers),
        )


def _checkpoints(model: nn.Module) -> bool:
    """Whether a model of transformers has activation checkpointing on; the older name is asked where it is the one."""
    inner = getattr(model, "module", model)
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(inner, name):
            return bool(getattr(inner, name))
    return False


def _phase(step: StepInProgress | None) -> Phase:
    return Phase.OUTSIDE if step is None else step.phase


def _number(step: StepInProgress | None) -> int | None:
    return None if step is None else step.number


def _works_on_lists(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer uses its foreach form: asked for, or by default, which is so on a GPU only."""
    settings = optimizer.defaults
    if "foreach" not in settings or settings.get("fused"):
        return False
    chosen = settings["foreach"]
    return device.type == "cuda" if chosen is None else bool(chosen)

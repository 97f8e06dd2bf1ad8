"""From a failed allocation to its report: what is read at that moment, for one tracer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.categories import Phase
from memtrace.guard import Guard
from memtrace.oom.advice import ModelFacts
from memtrace.oom.composition import Holding, StepFacts, from_blocks, from_ledger, from_timeline
from memtrace.oom.failure import failing_module, first_line, out_of_memory, requested_bytes
from memtrace.oom.fragmentation import parse_fragmentation
from memtrace.oom.holders import module_names, repeated_blocks
from memtrace.oom.markdown import headline
from memtrace.oom.scene import Scene, describe
from memtrace.oom_report import FailedRequest, Fragmentation, OomReport, Witness
from memtrace.snapshot import Snapshot
from memtrace.sources.cuda_allocator import live_blocks, segments
from memtrace.sources.events import EventSource
from memtrace.sources.failures import FAILURES
from memtrace.steps import StepInFlight
from memtrace.tracing import TraceWindow

MAX_REPORTS_A_STEP = 3
"""Failures told by the allocator that are looked into in one step: a convolution may fail often, each time with a
smaller workspace, and then succeed."""


class Publish(Protocol):
    """What is done with a report."""

    def __call__(self, report: OomReport, *, again: bool) -> Path | None:
        """Files a report and returns where; `again` says that it replaces the one of the same time."""


class OomWatch:
    """Looks at what is live when an allocation has failed.

    Allocates nothing on the device and does not synchronise it. One failure is told twice on a CUDA device: by the
    allocator, when everything is still there, and by the exception, which says where it happened; the second
    completes the first report.
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
        current_step: Callable[[], StepInFlight | None],
        snapshot: Callable[[], Snapshot],
        publish: Publish,
    ) -> None:
        self._model, self._scan = model, scan
        self._source, self._ledger, self._window, self._guard = source, ledger, window, guard
        self._current_step, self._snapshot, self._publish = current_step, snapshot, publish
        self._unexplained: OomReport | None = None
        """The last report that the allocator has led to and that no exception has completed yet."""
        self._failed_step: int | None = None
        self._failures = 0
        """Failures reported in that step."""
        self._note: str | None = None
        """What was added to the last exception."""

    def subscribe(self) -> Callable[[], None]:
        """Learns from now on of failures that nobody hands over; returns what ends that."""
        return FAILURES.subscribe(self._allocator_says, self._crashed, cuda=self._ledger.device.type == "cuda")

    def raised(self, error: BaseException) -> None:
        """Reports an exception, once, where it says that the device's memory has run out."""
        cause = out_of_memory(error, self._ledger.device.type)
        if cause is None or (self._note is not None and self._note in getattr(error, "__notes__", ())):
            return
        step = self._current_step()
        message, module = first_line(cause), failing_module(cause, self._model)
        known, self._unexplained = self._unexplained, None
        if known is not None and known.step == _number(step):
            report = replace(known, request=replace(known.request, message=message, module=module))
            path = self._publish(report, again=True)
        else:
            request = FailedRequest(
                witness=Witness.EXCEPTION,
                phase=_phase(step),
                requested_bytes=requested_bytes(cause),
                module=module,
                message=message,
            )
            report, path = self._report(request, step)
        self._note = f"memtrace: {headline(report)}{'' if path is None else f'. Report: {path}'}"
        error.add_note(self._note)

    def restarted(self) -> None:
        """Reports the step in flight, which was given up for lack of memory, unless that failure is known."""
        step = self._current_step()
        if step is not None and not self._is_known(step):
            self._report(FailedRequest(witness=Witness.RESTART, phase=_phase(step)), step)

    def _allocator_says(self, device_index: int, requested: int, free: int) -> None:
        if device_index == self._ledger.device.index:
            self._guard.run(self._allocation_failed, requested, free)

    def _allocation_failed(self, requested: int, free: int) -> None:
        step = self._current_step()
        if self._failures_in(step) >= MAX_REPORTS_A_STEP:
            return
        request = FailedRequest(
            witness=Witness.ALLOCATOR, phase=_phase(step), requested_bytes=requested, free_bytes=free
        )
        self._unexplained, _ = self._report(request, step)

    def _crashed(self, error: BaseException) -> None:
        self._guard.run(self.raised, error)

    def _failures_in(self, step: StepInFlight | None) -> int:
        return self._failures if self._failed_step == _number(step) else 0

    def _is_known(self, step: StepInFlight) -> bool:
        return self._failures_in(step) > 0

    def _report(self, request: FailedRequest, step: StepInFlight | None) -> tuple[OomReport, Path | None]:
        self._failures = self._failures_in(step) + 1
        self._failed_step = _number(step)
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
        report = describe(
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
        return report, self._publish(report, again=False)

    def _on_cuda(self, step: StepInFlight | None, listed: Sequence[Any]) -> tuple[list[Holding], bool, Fragmentation]:
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
        holdings, estimated = from_blocks(blocks, known, hidden, facts, self._scan.workspace_sizes())
        return holdings, estimated, parse_fragmentation(listed, index)

    def _on_cpu(self, step: StepInFlight | None) -> tuple[list[Holding], bool]:
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


def _phase(step: StepInFlight | None) -> Phase:
    return Phase.OUTSIDE if step is None else step.phase


def _number(step: StepInFlight | None) -> int | None:
    return None if step is None else step.number


def _works_on_lists(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer uses its foreach form: asked for, or by default, which is so on a GPU only."""
    settings = optimizer.defaults
    if "foreach" not in settings or settings.get("fused"):
        return False
    chosen = settings["foreach"]
    return device.type == "cuda" if chosen is None else bool(chosen)

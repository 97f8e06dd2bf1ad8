"""The tracer: what a training loop talks to. It holds settings and figures, and the training only while attached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from memtrace.allocator.recording import AllocatorRecording
from memtrace.attribution.curve import HighestSteps
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.optimizers.finding import HandedOver, flat
from memtrace.config import TracerConfig
from memtrace.errors import ConfigError
from memtrace.guard import Guard
from memtrace.record.breakdown import StepRecord
from memtrace.record.oom.report import OomReport
from memtrace.record.plan import read_plan
from memtrace.record.risk_reading import LargestBatch, largest_by_setting
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.sources.events import EventSource
from memtrace.tracing.publication import Listener, Publication
from memtrace.tracing.schedule import TraceSchedule
from memtrace.tracing.watch import Watch


class Tracer:
    """Watches one model and its optimizers on one device, and makes a StepRecord of every step.

    A step begins with the first forward pass that may be followed by a backward pass, and ends when every optimizer
    has stepped that does not idle: a cycle of a generator and its critic is one step, whoever steps more often. An
    optimizer idles that has not stepped while another one has stepped 16 times; see `cycle.Cycle`. With
    `explicit_steps` a step is where the training loop calls `begin_step()` and `end_step()`. Forward passes without
    gradients (evaluation, generation) belong to no step.

    A forward pass is a call of the model. Where the loop calls a method of it or modules inside it instead, and never
    the model, those that run first stand for it: see `entries.Entries`.

    From `detach()` on it holds figures only: model and optimizers are let go, and can be attached again as long as
    somebody else holds them.

    Args:
        model: the module that is trained, with at least one parameter; a `ModuleList` of several networks where they
            are trained together. Its device is the device that is watched: the one that holds most of the parameters'
            bytes.
        optimizers: one optimizer or several that update the model, wrapped or not.
        config: the settings.
        explicit_steps: whether the loop tells where steps begin and end.
        source: where allocator events come from; by default the device's own. One that is open already makes a
            window from birth: see `TraceWindow`.
        further_models: the models that the training holds beside the trained one (a reference, a teacher, a reward
            model, an EMA copy), by name: modules, or objects that hold tensors. Their weights have the name as
            component. Held weakly.

    Raises:
        ConfigError: the model has no parameters, an optimizer holds none of them, or a further model holds no tensors.
        LogFormatError: the plan file is no plan.
        OutputError: the plan file cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: TracerConfig | None = None,
        *,
        explicit_steps: bool = False,
        source: EventSource | None = None,
        further_models: Mapping[str, Any] | FurtherModels | None = None,
    ) -> None:
        self.config = config or TracerConfig()
        self._further = further_models if isinstance(further_models, FurtherModels) else FurtherModels(further_models)
        self._explicit = explicit_steps
        self._guard = Guard(self._switch_off, strict=self.config.strict)
        self._schedule = TraceSchedule(
            trace_every=self.config.trace_every,
            overhead_budget=self.config.overhead_budget,
            max_trace_interval=self.config.max_trace_interval,
        )
        self._published = Publication(
            identity=RunIdentity(run_name=self.config.run_name or "run"),
            history=self.config.history,
            largest=largest_by_setting(self.config.max_tokens),
            plan={} if self.config.plan is None else read_plan(Path(self.config.plan)).moments,
            skipped=self._skipped_steps,
        )
        self._highest = HighestSteps(every=self.config.timelines)
        self._attached = False
        self._rest: Callable[[], None] = lambda: None
        """Takes off what the last watch had to leave, released inside a backward pass: unless the model's next forward
        pass has done it."""
        self._skipped_before = 0
        """Steps that were skipped in earlier watches."""
        self._watch: Watch | None = self._begin_watch(model, optimizers, source)
        """What holds the training; None after `detach()`."""
        self._subject = _Subject(model, optimizers)

    def _begin_watch(self, model: nn.Module, optimizers: Any, source: EventSource | None = None) -> Watch:
        return Watch(
            model,
            optimizers,
            self.config,
            explicit=self._explicit,
            source=source,
            guard=self._guard,
            schedule=self._schedule,
            published=self._published,
            snapshot=self.snapshot,
            publish_oom=self._publish_oom,
            highest=self._highest,
            further=self._further,
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A model that holds its tracer may be copied (an average of its weights): a copy is not watched, and there is
        # one tracer of the run.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # None in its place: whoever loads a model that holds its tracer need not have memtrace.
        return type(None), ()

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.report_failure(error)
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether hooks are installed."""
        return self._attached

    @property
    def latest(self) -> StepRecord | None:
        """The record of the last finished step; None before the first one."""
        return self._published.latest

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """The records of the recent steps, oldest first, as many as `TracerConfig.history` says."""
        return self._published.history

    @property
    def identity(self) -> RunIdentity:
        """Which process of which run this is; complete once attached."""
        return self._published.snapshot.identity

    @property
    def allocator_recording(self) -> AllocatorRecording | None:
        """What CUDA's allocator was asked for in the traced step with the highest peak; None before it and on a CPU."""
        return self._highest.recording

    def snapshot(self) -> Snapshot:
        """Returns the state for exporters: one immutable value, with the newest reading of the device.

        May be called from any thread.
        """
        watch = self._watch
        return self._published.snapshot_with(None if watch is None else watch.sampler)

    def add_listener(self, listener: Listener) -> None:
        """Calls `listener(record)` on the training thread after each step."""
        self._published.add_listener(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stops calling `listener`; one that is not called is left alone."""
        self._published.remove_listener(listener)

    def expect_batch(self, batch: LargestBatch) -> None:
        """Tells how large a micro batch the run can still meet, unless `max_tokens` of the settings says so already."""
        if self.config.max_tokens is None:
            self._published.expect(batch)

    def report_failure(self, error: BaseException) -> None:
        """Makes an OOM report of an exception that says so, and adds a note of it to the exception; ignores others."""
        watch = self._watch
        if watch is not None:  # a fault in the first lets go of it
            self._guard.run(watch.oom.raised, error)

    def report_restart(self) -> None:
        """Makes an OOM report of a step in progress that the loop has given up because memory had run out."""
        if self._watch is not None:
            self._guard.run(self._watch.oom.restarted)

    def trace_next(self) -> None:
        """Makes the next step a traced one."""
        if self._watch is not None:
            self._watch.skipped.hasten()
        self._schedule.ask()

    def attach(self) -> None:
        """Installs the hooks. A tracer that is attached already is left as it is; a half-failed attach is undone.

        It looks at parameters and gradients: call it on the thread that trains, or while nobody does. So for `detach`.

        Raises:
            ConfigError: the model or an optimizer that it had before `detach()` is gone.
        """
        if not self._attached:
            self._guard.set_up(self._attach, undo=self.detach)

    def detach(self) -> None:
        """Takes off every hook, stops the sampling thread and lets the training go. Records stay readable.

        Where Ctrl-C comes into it, a second call does what is left.
        """
        try:
            if self._watch is not None:
                self._guard.run(self._watch.settle)
        finally:
            self._guard.finish(self._release)

    def begin_step(self, number: int | None = None) -> None:
        """Begins a step, where the loop tells its steps; `number` is the loop's own count, from 1."""
        if self._watch is not None:
            self._guard.run(self._watch.begin, number)

    def end_step(self) -> None:
        """Ends the step in progress, where the loop tells its steps."""
        if self._watch is not None:
            self._guard.run(self._watch.end)

    def guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs memtrace's own code under the guard of this tracer: see `guard.Guard.run`."""
        return self._guard.run(function, *args)

    def _attach(self) -> None:
        if self._watch is None:
            self._watch = self._begin_watch(*self._subject.alive())
        self._watch.attach()
        self._attached = True

    def _release(self) -> None:
        watch, self._attached = self._watch, False
        if watch is not None:
            watch.release()
            self._watch = None  # not before: what Ctrl-C has interrupted is released again
            self._skipped_before += watch.skipped.done
            self._rest = watch.window.rest()
        self._rest()

    def _skipped_steps(self) -> int:
        """Returns how many steps were skipped without a record, for the snapshot of any thread."""
        watch = self._watch
        return self._skipped_before + (0 if watch is None else watch.skipped.done)

    def _switch_off(self) -> None:
        """Ends measuring after a fault; what exports the snapshot goes on, and says that memtrace is not up."""
        self._published.switch_off()
        self._release()

    def _publish_oom(self, report: OomReport) -> Path | None:
        """Counts a failed allocation, unless torch may have caught it; returns where its report is: nowhere here."""
        if not report.request.pending:
            self._published.count_oom()
        return None


class _Subject:
    """A model and its optimizers, held weakly: what a detached tracer may be attached to again."""

    def __init__(self, model: nn.Module, optimizers: Any) -> None:
        self._model = weakref.ref(model)
        self._optimizers = [*map(weakref.ref, flat(optimizers))]
        self._as_given = HandedOver if isinstance(optimizers, HandedOver) else list

    def alive(self) -> tuple[nn.Module, Any]:
        """Returns the model and a list of its optimizers.

        Raises:
            ConfigError: one of them is gone.
        """
        model, optimizers = self._model(), [optimizer() for optimizer in self._optimizers]
        if model is None or None in optimizers:
            raise ConfigError("the model or an optimizer of this tracer is gone since its detach: make a new tracer")
        return model, self._as_given(optimizers)

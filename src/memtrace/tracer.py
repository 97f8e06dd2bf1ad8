"""The tracer: the one stateful joint between a training loop, the sources, the ledger and the record of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from memtrace.attribution.counted import CountedSteps
from memtrace.attribution.curve import HighestSteps
from memtrace.attribution.host import HostMemory
from memtrace.attribution.inputs import claim_batch, count_tokens, main_input
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.attribution.storages import canonical_device
from memtrace.attribution.timeline import StepMarks
from memtrace.breakdown import Breakdown, StepCurve, StepRecord
from memtrace.categories import Moment
from memtrace.config import TracerConfig
from memtrace.garbage import uncollected
from memtrace.guard import Guard
from memtrace.oom.watch import OomWatch
from memtrace.oom_report import OomReport
from memtrace.passing import PassedSteps
from memtrace.planning.plan import read_plan
from memtrace.publication import Listener, Publication
from memtrace.risk_reading import LargestBatch, largest_by_setting
from memtrace.sampling import TraceSchedule
from memtrace.snapshot import RunIdentity, Snapshot
from memtrace.sources.device import open_device
from memtrace.sources.device_sampler import DeviceSampler
from memtrace.sources.event_source import event_source
from memtrace.sources.events import EventSource
from memtrace.sources.hooks import HookSet, outside_graphs
from memtrace.sources.ranks import identify
from memtrace.sources.torch_private import backward_is_running
from memtrace.steps import StepInFlight
from memtrace.tracing import TraceWindow


class Tracer:
    """Watches one model and its optimizers on one device, and makes a StepRecord of every step.

    A step begins with the first forward pass that may be followed by a backward pass, and ends when every optimizer
    has stepped; or, with `explicit_steps`, where the training loop calls `begin_step()` and `end_step()`. Forward
    passes without gradients (evaluation, generation) belong to no step.

    Args:
        model: the module that is trained, with at least one parameter. Its device is the device that is watched: the
            one that holds most of the parameters' bytes.
        optimizers: one optimizer or several that update the model, wrapped or not.
        config: the settings.
        explicit_steps: whether the loop tells where steps begin and end.
        source: where allocator events come from; by default the device's own. One that is open already makes a
            window from birth: see `TraceWindow`.

    Raises:
        ConfigError: the model has no parameters, or an optimizer holds none of them.
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
    ) -> None:
        self.config = config or TracerConfig()
        self._model = model
        self._scan = Scan(model, optimizers)
        self._explicit = explicit_steps
        self._guard = Guard(self._switch_off, strict=self.config.strict)
        self._schedule = TraceSchedule(
            trace_every=self.config.trace_every,
            overhead_budget=self.config.overhead_budget,
            max_trace_interval=self.config.max_trace_interval,
        )
        self._watch(self._scan.device, source)
        self._hooks = HookSet()
        self._step: StepInFlight | None = None
        self._sampler: DeviceSampler | None = None
        self._main_input_name = getattr(model, "main_input_name", None)
        self._passed = PassedSteps(
            self._scan, self._guard, explicit=explicit_steps, main_input_name=self._main_input_name
        )
        self._published = Publication(
            identity=RunIdentity(run_name=self.config.run_name or "run", device=str(self._device)),
            history=self.config.history,
            largest=largest_by_setting(self.config.max_tokens),
            plan={} if self.config.plan is None else read_plan(Path(self.config.plan)).moments,
            passed=lambda: self._passed.done,
        )
        self._highest_steps = HighestSteps()
        self._attached = False
        self._spent_before_ns = 0

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

    def snapshot(self) -> Snapshot:
        """Returns the state for exporters: one immutable value, with the newest reading of the device.

        May be called from any thread.
        """
        return self._published.snapshot_with(self._sampler)

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
        self._guard.run(self._oom.raised, error)
        self._guard.run(self._window.explain, error)

    def report_restart(self) -> None:
        """Makes an OOM report of a step in flight that the loop has given up because memory had run out."""
        self._guard.run(self._oom.restarted)

    def trace_next(self) -> None:
        """Makes the next step a traced one."""
        self._passed.hasten()
        self._schedule.ask()

    def attach(self) -> None:
        """Installs the hooks. A tracer that is attached already is left as it is; a half-failed attach is undone."""
        if not self._attached:
            self._guard.set_up(self._attach, undo=self.detach)

    def detach(self) -> None:
        """Takes off every hook, stops the sampling thread and forgets a step in flight. Records stay readable."""
        self._guard.run(self._settle)
        self._guard.finish(self._release)

    def begin_step(self, number: int | None = None) -> None:
        """Begins a step, where the loop tells its steps; `number` is the loop's own count, from 1."""
        self._guard.run(self._begin_told, number)

    def end_step(self) -> None:
        """Ends the step in flight, where the loop tells its steps."""
        self._guard.run(self._end)

    def _watch(self, device: torch.device, source: EventSource | None = None) -> None:
        """Sets up what belongs to one device."""
        self._device = device
        self._anchor = next((p for p in self._model.parameters() if canonical_device(p.device) == device), None)
        """A parameter that tells when the model is moved; None where an engine keeps all of them elsewhere."""
        self._source = source or event_source(device)
        self._ledger = Ledger(device)
        self._counted = CountedSteps(self._scan, self._ledger)
        self._host = HostMemory(self._scan, device)
        self._window = TraceWindow(
            model=self._model,
            scan=self._scan,
            source=self._source,
            ledger=self._ledger,
            guard=self._guard,
            current_step=lambda: self._step,
            trace_activations=self.config.trace_activations,
        )
        self._oom = OomWatch(
            model=self._model,
            scan=self._scan,
            source=self._source,
            ledger=self._ledger,
            window=self._window,
            guard=self._guard,
            current_step=lambda: self._step or self._passed.in_flight(),
            snapshot=self.snapshot,
            publish=self._publish_oom,
        )

    def _follow(self) -> None:
        """Starts anew on the device that the model has been moved to since the tracer was attached."""
        self._release()
        self._watch(self._scan.device)
        self._attach()

    def guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs memtrace's own code under the guard of this tracer: see `guard.Guard.run`."""
        return self._guard.run(function, *args)

    def _attach(self) -> None:
        identity = identify(self._device, self.config.run_name)
        device_type, uuid = self._device.type, identity.gpu_uuid
        self._sampler = DeviceSampler(
            lambda: open_device(device_type, uuid), period_seconds=self.config.device_poll_seconds
        )
        self._sampler.start()
        self._published.begin(identity, self.config.device_limit_bytes)
        if not self._window.adopt():
            self._scan.claim_persistent(self._ledger)
        self._host.look()
        wrap, passed = self._guard.wrap, self._passed
        self._hooks.before_forward(self._model, passed.before_forward(outside_graphs(wrap(self._on_forward))))
        self._hooks.after_forward(self._model, passed.after_forward(outside_graphs(wrap(self._on_forward_end))))
        before = passed.before_optimizer(wrap(self._on_optimizer))
        after = passed.after_optimizer(wrap(self._on_optimizer_end))
        for optimizer in self._scan.optimizers:
            self._hooks.around_step(optimizer, before, after)
        self._hooks.callback(self._oom.subscribe())
        self._attached = True

    def _release(self) -> None:
        self._step = None
        self._passed.stop()
        self._window.abandon()
        self._hooks.close()
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        self._ledger.clear()
        self._attached = False

    def _switch_off(self) -> None:
        """Ends measuring after a fault; what exports the snapshot goes on, and says that memtrace is not up."""
        self._published.switch_off()
        self._release()

    def _begin_told(self, number: int | None) -> None:
        if self._passed.left:
            self._passed.begins(number)
        else:
            self._begin(number)

    def _begin(self, number: int | None = None) -> None:
        if self._anchor is not None and self._anchor.device != self._device:
            self._follow()
        number = number or self._published.steps + 1
        prepares = self._scan.prepares_gradients
        self._step = StepInFlight(
            number=number, read=self._source.reading, prepares_gradients=prepares, spent_ns=self._passed.spent_ns
        )

    def _decide(self, step: StepInFlight, batch: torch.Tensor | None) -> None:
        """Makes the step a traced one or a counted one, once its first batch is known."""
        tokens = 0 if batch is None else count_tokens(batch)
        wanted = self._schedule.wants(step.number, has_state=self._scan.has_state, tokens=tokens)
        if wanted and not self._window.is_open and not self._window.open():
            self._schedule.missed()
        step.recorded = wanted and self._window.is_open

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._settle()
        if not torch.is_grad_enabled() or backward_is_running():
            return  # evaluation, or a checkpoint around the model that computes it again
        if self._explicit and self._step is None and self._passed.number is None:
            return
        batch = main_input(args, kwargs, self._main_input_name)
        if self._step is None and self._passed.takes(batch):
            return
        if self._step is None:
            self._begin(self._passed.stop())
        step = self._step
        assert step is not None
        if step.recorded is None:
            self._scan.look_in_forward()
            self._decide(step, batch)
        step.forward_begins(batch)
        if self._window.is_open:
            claim_batch(args, kwargs, self._ledger)
        self._window.forward_begins()

    def _on_forward_end(self, error: BaseException | None) -> None:
        if error is not None:
            self._oom.raised(error)
            self._window.explain(error)
        if self._step is not None and torch.is_grad_enabled() and not backward_is_running():
            self._step.forward_ends()
            self._window.forward_ends()

    def _on_optimizer(self, *_: object) -> None:
        self._settle()
        if self._step is None:
            if self._explicit or self._passed.left:
                return
            self._begin()
        assert self._step is not None
        self._step.optimizer_begins()
        if self._window.is_open:
            self._window.backward_ends()

    def _on_optimizer_end(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._step is None:
            if self._passed.left:
                self._passed.optimizer_ends(optimizer)
            return
        self._step.optimizer_ends(optimizer)
        if not self._explicit and self._scan.finished(self._step.stepped):
            self._step.marks = self._step.ends()
            self._settle()

    def _settle(self) -> None:
        """Ends the step in flight if it is over.

        Where optimizers step inside the backward pass that comes later, with the next forward pass or with `detach()`:
        torch keeps a recording on until the backward pass has ended.
        """
        if self._step is not None and self._step.marks is not None and not backward_is_running():
            self._end()

    def _end(self) -> None:
        step, self._step = self._step, None
        if step is None:
            if self._passed.number is not None:
                self._passed.step_ends()
            return
        marks = step.marks or step.ends()
        seconds, inside = (marks.end_ns - marks.begin_ns) / 1e9, (self._passed.spent_ns - step.spent_ns) / 1e9
        moments, curve = self._seen(step, marks)
        water = self._counted.water(step.reads)
        if self._scan.learn_new_state(self._ledger) or moments is not None:
            self._host.look()
        spent_ns = self._passed.spent_ns
        record = StepRecord(
            step=step.number,
            rank=self.identity.rank,
            device=str(self._device),
            traced=moments is not None,
            unix_seconds=marks.end_ns / 1e9,
            self_seconds=(spent_ns - self._spent_before_ns) / 1e9,
            slowed_seconds=0.0 if moments is None else self._schedule.slowed(seconds - inside),
            step_seconds=seconds,
            batch=step.batch(),
            moments=moments or self._counted.moments(step.before_forward, step.readings, step.forward_added, water),
            allocator=step.readings.get(Moment.STEP_END),
            host=self._host.entries,
            device_memory=self._sampler.reading() if self._sampler is not None else None,
            peak_counter_reset=water.was_reset,
            curve=curve,
        )
        self._spent_before_ns = spent_ns
        self._schedule.ended(record, passed_seconds=self._passed.seconds)
        self._published.publish(record)
        self._passed.plan(self._schedule, following=self._published.steps + 1)

    def _seen(self, step: StepInFlight, marks: StepMarks) -> tuple[Mapping[Moment, Breakdown] | None, StepCurve | None]:
        """Ends the window and returns what it says of the step; nothing without one, or where it lost events."""
        if not step.recorded or not self._window.is_open:
            return None, None
        with uncollected():
            timeline = self._window.close()
            if timeline is None:
                self._schedule.missed()
                return None, None
            moments = timeline.moments(marks)
            self._counted.learn(moments, step.forward_added)
            return moments, self._highest_steps.curve(timeline, marks)

    def _publish_oom(self, report: OomReport) -> Path | None:
        """Counts a failed allocation, unless torch may have caught it; returns where its report is: nowhere here."""
        if not report.request.pending:
            self._published.count_oom()
        return None

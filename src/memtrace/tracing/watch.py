"""A watch: everything of memtrace that refers to a training. It is let go as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from memtrace.attribution.counted import CountedSteps
from memtrace.attribution.curve import HighestSteps
from memtrace.attribution.garbage import uncollected
from memtrace.attribution.inputs import claim_batch, main_input
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.models.host import HostMemory
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.storages import canonical_device
from memtrace.attribution.timeline import StepMarks
from memtrace.attribution.window import TraceWindow
from memtrace.config import TracerConfig
from memtrace.guard import Guard
from memtrace.oom.watch import OomWatch, Publish
from memtrace.record.breakdown import AllocatorReading, Breakdown, StepCurve, StepRecord
from memtrace.record.categories import Moment
from memtrace.record.limitations import Unseen
from memtrace.record.snapshot import Snapshot
from memtrace.sources.at_exit import at_exit
from memtrace.sources.autograd_torch_private import backward_is_running
from memtrace.sources.devices.fresh_readings import refresh_of
from memtrace.sources.devices.readers import open_device
from memtrace.sources.devices.sampler import DeviceSampler
from memtrace.sources.event_source import annotator_of, event_source
from memtrace.sources.events import EventSource
from memtrace.sources.hooks import HookSet
from memtrace.sources.ranks import identify
from memtrace.sources.torch_private import runs_without_memory
from memtrace.tracing.annotations import Annotations
from memtrace.tracing.bounds import StepBounds
from memtrace.tracing.choice import TraceChoice
from memtrace.tracing.current_step import CurrentStep
from memtrace.tracing.cycle import Cycle
from memtrace.tracing.entries import Entries
from memtrace.tracing.forward_passes import ForwardPasses
from memtrace.tracing.publication import Publication
from memtrace.tracing.schedule import TraceSchedule
from memtrace.tracing.skipped_steps import SkippedSteps
from memtrace.tracing.updates import UpdatesInBackward


class Watch:
    """Watches one model and its optimizers on one device, from `attach` to `release`; then it is thrown away.

    What outlives it is handed in: the settings, the guard, the schedule and what is published.

    Args:
        model: see `tracer.Tracer`.
        optimizers: see `tracer.Tracer`.
        config: the settings.
        explicit: whether the loop tells where steps begin and end.
        source: where allocator events come from; by default the device's own.
        guard: runs all that is called by torch.
        schedule: decides which steps are traced.
        published: takes in the records.
        snapshot: returns the newest state, for reports.
        publish_oom: takes in reports of failed allocations.
        highest: decides which steps have a curve.
        further: the models beside the trained one.

    Raises:
        ConfigError: the model has no parameters, or an optimizer holds none of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: TracerConfig,
        *,
        explicit: bool,
        source: EventSource | None,
        guard: Guard,
        schedule: TraceSchedule,
        published: Publication,
        snapshot: Callable[[], Snapshot],
        publish_oom: Publish,
        highest: HighestSteps,
        further: FurtherModels,
    ) -> None:
        self.model = model
        self._config = config
        self._explicit = explicit
        self._guard = guard
        self._schedule = schedule
        self._published = published
        self._snapshot = snapshot
        self._publish_oom = publish_oom
        self._highest = highest
        self._scan = Scan(model, optimizers, further=further)
        self.sampler: DeviceSampler | None = None
        self._main_input_name = getattr(model, "main_input_name", None)
        self._hooks = HookSet()
        self._cycle = Cycle(self._scan)
        self.skipped = SkippedSteps(
            self._scan, self._cycle, guard, explicit=explicit, main_input_name=self._main_input_name
        )
        self._current = CurrentStep(self.skipped)
        self._spent_before_ns = self.skipped.spent_ns
        self._bounds = StepBounds(published, schedule)
        self._passes = ForwardPasses(model)
        self._set_up(self._scan.device, source)

    def _set_up(self, device: torch.device, source: EventSource | None = None) -> None:
        """Sets up what belongs to one device."""
        self._device = device
        highest = self._highest
        self._anchor = self._find_anchor()
        """A parameter that tells when the model is moved; of none where an engine keeps all of them elsewhere."""
        self._source = source or event_source(device)
        self._ledger = Ledger(device)
        self._counted = CountedSteps(self._scan, self._ledger)
        self._host = HostMemory(self._scan, device)
        self._updates = UpdatesInBackward(self._scan, self._cycle, self._guard, self._current)
        annotator = annotator_of(self._source) if self._config.annotate_snapshots else None
        self._annotations = Annotations(self._scan, self._ledger, annotator)
        bounds, current = self._bounds, self._current  # not self: whoever drops all of it frees it at once
        self.window = TraceWindow(
            model=self.model,
            scan=self._scan,
            source=self._source,
            ledger=self._ledger,
            guard=self._guard,
            current_step=self._current.with_marks,
            may_end=lambda window: bounds.look_at_window(current.step, window),
            trace_activations=self._config.trace_activations,
            hears_saved=None if annotator is None else self._annotations.saved,
        )
        self._choice = TraceChoice(self._scan, self._schedule, self._published, self.window, self._source)
        self.oom = OomWatch(
            model=self.model,
            scan=self._scan,
            source=self._source,
            ledger=self._ledger,
            window=self.window,
            guard=self._guard,
            current_step=self._current.any,
            snapshot=self._snapshot,
            publish=self._publish_oom,
            recording=lambda: highest.recording,
        )

    def _find_anchor(self) -> Callable[[], torch.Tensor | None]:
        held, self._walks = self._scan.held, self._scan.walks
        here = (p for p in held.parameters() if canonical_device(p.device) == self._device)
        return next(map(held.reference_to, here), lambda: None)

    def attach(self) -> None:
        """Installs the hooks and starts the sampling thread. What raises leaves the rest to `release`."""
        identity = identify(self._device, self._config.run_name, self._config.run_id, self.model)
        device_type, uuid = self._device.type, identity.gpu_uuid
        self.sampler = DeviceSampler(
            lambda: open_device(device_type, uuid),
            period_seconds=self._config.device_poll_seconds,
            refresh=refresh_of(self._device),
        )
        self.sampler.start()
        self._schedule.ranks = identity.world_size
        self._published.begin(identity, self._config.device_limit_bytes)
        if not self.window.adopt():
            self._scan.claim_persistent(self._ledger, anew=False)
        self._host.look()
        wrap, skipped = self._guard.wrap, self.skipped
        begins, ends = wrap(self._on_forward), wrap(self._on_forward_end)
        before, after = skipped.around_forward(begins, ends, breaks_graphs=True)
        self._hooks.before_forward(self.model, before)
        self._hooks.after_forward(self.model, after)
        self._entries = Entries(self.model, *skipped.around_forward(begins, ends, breaks_graphs=False), self._guard)
        self._hooks.callback(self._entries.release)
        for one in self._scan.optimizers:
            before = skipped.before_optimizer(one, wrap(self._on_optimizer))
            after = skipped.after_optimizer(one, wrap(self._on_optimizer_end))
            self._hooks.around_steps(one, self._scan.parts_of(one), before, after)
        if not self._explicit:
            self.skipped.dropped.follow(self.model)
        self._hooks.callback(self.skipped.dropped.close)
        self._hooks.callback(self.oom.subscribe())
        self._hooks.callback(at_exit(self._exits))

    def release(self) -> None:
        """Takes off every hook, ends the window and the sampling thread, and forgets a step in progress.

        Nothing of it refers to itself: who drops it then lets the training go at once.
        """
        self._current.step = None
        self.skipped.stop()
        with ExitStack() as ending:  # each of them, whatever the others raise
            ending.callback(self._ledger.clear)
            if self.sampler is not None:
                ending.callback(self.sampler.stop)
            ending.callback(self._hooks.close)
            ending.callback(self.window.release)
        self.sampler = None

    def _exits(self) -> None:
        """Ends the window before the interpreter is gone: what records then crashes."""
        self._guard.finish(self.window.abandon)

    def _follow(self) -> None:
        """Starts anew on the device that the model has been moved to since the tracer was attached."""
        self.release()
        self._set_up(self._scan.device)
        self.attach()

    def begin(self, number: int | None) -> None:
        """Begins a step, where the loop tells its steps; `number` is the loop's own count, from 1."""
        if self.skipped.left:
            self.skipped.begins(number)
        else:
            self._begin(number)

    def _begin(self, number: int | None = None) -> None:
        if (anchor := self._anchor()) is not None and anchor.device != self._device:
            self._follow()
        number = number or self._published.steps + 1
        prepares = self._scan.prepares_gradients
        self._current.step = StepInProgress(
            number=number, read=self._read, prepares_gradients=prepares, spent_ns=self.skipped.spent_ns
        )

    def _read(self) -> AllocatorReading | None:
        """Returns the allocator's counters now, for the sampler to tell which of its readings belong to them."""
        reading = self._source.reading()
        if reading is not None and self.sampler is not None:
            self.sampler.note(reading)
        return reading

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if runs_without_memory() or self._passes.is_elsewhere(module, (args, kwargs), self._device):
            return
        self.settle()
        step = self._current.step
        begins = step is None or step.entered_by in (None, id(module)) or not self._entries.are_followed
        if begins:
            self._bounds.look(step, self.window, skipped_passes=self.skipped.passes)
        if not self._passes.is_training(module):
            return
        if self._explicit and self._current.step is None and self.skipped.number is None:
            return
        if begins and not self._explicit and self._updates.look(step, self._hooks):
            self.settle()
        if module is self.model:
            self._entries.model_begins()
        batch = main_input(args, kwargs, self._main_input_name)
        if self._current.step is None and self.skipped.takes(batch):
            return
        if self._current.step is None:
            self._begin(self.skipped.stop())
        step = self._current.step
        assert step is not None
        if begins:
            self._forward_begins(step, module, batch)
        else:
            step.forward_goes_on()
        if self.window.is_open:
            claim_batch(args, kwargs, self._ledger)
        self.window.forward_begins(hooked=not self._passes.on_several_threads())

    def _forward_begins(self, step: StepInProgress, module: nn.Module, batch: torch.Tensor | None) -> None:
        if step.recorded is None:
            self._scan.look_in_forward()
            for limitation in self._scan.limitations:
                self._published.limit(limitation)
            self._choice.make(step, batch)
        if self.window.is_open:
            self._entries.window_opens(module)
        step.entered_by = step.entered_by or id(module)
        step.forward_begins(batch)

    def _on_forward_end(self, module: nn.Module, output: object, error: BaseException | None) -> None:
        if error is not None:
            self.oom.raised(error)
        self.window.leaves_thread()
        if module is self.model:
            self._entries.model_ends()
        step = None if self._passes.is_elsewhere(module, output, self._device) else self._current.step
        if step is None or runs_without_memory() or not self._passes.is_training(module):
            return
        step.forward_ends()
        self.window.forward_ends(output)

    def _on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._updates.begins() and not (self.window.is_open and backward_is_running()):
            self.end()
        if self._current.step is None:
            if self._explicit or self.skipped.optimizer_begins():
                return
            self._begin()
        assert self._current.step is not None
        self._annotations.optimizer_begins(optimizer, first=not self._current.step.stepped)
        self._current.step.optimizer_begins()
        if self.window.is_open:
            self.window.backward_ends(optimizer if backward_is_running() else None)

    def _on_optimizer_end(self, optimizer: torch.optim.Optimizer) -> None:
        step = self._current.step
        if step is None:
            self.skipped.optimizer_ends(optimizer)
            return
        step.optimizer_ends(inside_backward=backward_is_running())
        if not self._explicit and self._updates.ends(step, optimizer):
            self.settle()

    def settle(self) -> None:
        """Ends the step in progress if it is over.

        Where optimizers step inside the backward pass that comes later, with the next forward pass or with `detach()`:
        torch keeps a recording on until the backward pass has ended.
        """
        if self._current.step is not None and self._current.step.marks is not None and not backward_is_running():
            self.end()

    def end(self) -> None:
        """Ends the step in progress and publishes its record."""
        step, self._current.step = self._current.step, None
        if step is None:
            if self.skipped.number is not None:
                self.skipped.step_ends()
            return
        self._cycle.ends()
        marks = step.marks or step.ends()
        seconds = (marks.end_ns - marks.begin_ns) / 1e9
        inside = (self.skipped.spent_ns - step.spent_ns) / 1e9
        moments, curve = self._seen(step, marks)
        self._annotations.step_ends()
        water = self._counted.water(step.reads)
        end = step.readings.get(Moment.STEP_END)
        if self._scan.keep_up(self._ledger, None if end is None else end.requested_bytes) or moments is not None:
            self._host.look()
        if self._scan.walks != self._walks:
            self._choose_anew()
        spent_ns = self.skipped.spent_ns
        identity = self._published.snapshot.identity
        record = StepRecord(
            step=step.number,
            rank=identity.rank,
            run_id=identity.run_id,
            device=str(self._device),
            traced=moments is not None,
            unix_seconds=marks.end_ns / 1e9,
            self_seconds=(spent_ns - self._spent_before_ns) / 1e9,
            slowed_seconds=0.0 if not (step.recorded or step.lost) else self._schedule.slowed(seconds - inside),
            step_seconds=seconds,
            traced_from_micro_batch=None if moments is None else step.traced_from,
            batch=step.batch(),
            moments=moments or self._counted.moments(step.before_forward, step.readings, step.forward_added, water),
            allocator=step.readings.get(Moment.STEP_END),
            host=self._host.entries,
            device_memory=self.sampler.reading() if self.sampler is not None else None,
            peak_counter_reset=water.was_reset,
            curve=curve,
            replaced_bytes=self.window.leftovers.gone(),
        )
        self._highest.ended(record)
        self._spent_before_ns = spent_ns
        self._choice.ended(step)
        lost = step.lost or (bool(step.recorded) and moments is None)
        self._schedule.ended(record, skipped_seconds=self.skipped.seconds, lost=lost)
        self._bounds.ended(step, self.model, seconds)
        self._entries.step_ends(step.entered_by, window_is_open=self.window.is_open)
        if record.traced:
            self._published.sees(Unseen.TRACE)
        self._published.publish(record)
        self.skipped.plan(self._schedule, following=self._published.steps + 1)
        if self.skipped.left:
            self._entries.steps_are_skipped()

    def _choose_anew(self) -> None:
        """Chooses the parameters that stand for all anew: somebody may have put others in their place."""
        self._anchor = self._find_anchor()
        if not self._explicit:
            self.skipped.dropped.follow(self.model)

    def _seen(
        self, step: StepInProgress, marks: StepMarks
    ) -> tuple[Mapping[Moment, Breakdown] | None, StepCurve | None]:
        """Ends the window and returns what it says of the step; nothing without one, or where it lost events."""
        if not step.recorded or not self.window.is_open:
            return None, None
        with uncollected():
            timeline = self.window.close()
            if timeline is None:
                return None, None
            moments = timeline.moments(marks)
            if step.traced_from is None:
                self._counted.learn(moments, step.forward_added)
            self.window.leftovers.follow(timeline, marks)
            return moments, self._highest.curve(timeline, marks)

"""What is noted of a simulated step: its parts, its blocks and what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.inputs import claim_batch, main_input
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.attribution.window import TraceWindow
from memtrace.guard import Guard
from memtrace.planning.by_module import ModuleSpans, Owners
from memtrace.planning.optimizers.updates import Updates
from memtrace.record.breakdown import BatchShape
from memtrace.simulation.mode import Simulation
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.hooks import HookSet


class StepRecorder:
    """Marks the parts of a step and tags its blocks, through the hooks that the live tracer uses."""

    def __init__(
        self,
        model: nn.Module,
        updates: Updates,
        simulation: Simulation,
        workspaces: Sequence[int],
        further: FurtherModels,
        *,
        by_module: bool,
    ) -> None:
        self.ready = False
        """Whether the next step is the one to look at."""
        self.timeline: Timeline | None = None
        self.marks: StepMarks | None = None
        self.batch: BatchShape | None = None
        self._model, self._optimizer, self._updates = model, updates.optimizer, updates
        self.modules, self._by_module = ModuleSpans(simulation.events.coordinates.now_ns), by_module
        self.owners = Owners(simulation.events.coordinates.address_of)
        self._clock = simulation.events.coordinates.now_ns
        self._ledger = Ledger(DEVICE, simulation.events.coordinates)
        self._step: StepInProgress | None = None
        self._hooks = HookSet()
        engines = [updates] if isinstance(updates, Engine) else []
        self._scan = Scan(model, updates.optimizer, engines, further)
        self._scan.workspaces = workspaces
        self._window = TraceWindow(
            model=model,
            scan=self._scan,
            source=simulation.events,
            ledger=self._ledger,
            guard=Guard(lambda: None, strict=True),
            current_step=lambda: self._step,
        )

    def __enter__(self) -> Self:
        self._window.adopt()
        if self._by_module:
            self.modules.watch(self._model, self._hooks)
        self._hooks.before_forward(self._model, self._forward_begins)
        self._hooks.after_forward(self._model, self._forward_ends)
        self._hooks.around_step(self._optimizer, self._optimizer_begins, self._optimizer_ends)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._window.abandon()

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.ready or not torch.is_grad_enabled():
            return
        if self._step is None:
            self._step = StepInProgress(
                number=2,
                read=lambda: None,
                now_ns=self._clock,
                prepares_gradients=self._scan.prepares_gradients,
            )
        self._step.forward_begins(main_input(args, kwargs, getattr(module, "main_input_name", None)))
        claim_batch(args, kwargs, self._ledger)
        self._window.forward_begins()

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._step is not None and torch.is_grad_enabled():
            self._step.forward_ends()
            self._window.forward_ends(output)

    def _optimizer_begins(self, *_: object) -> None:
        if self._step is not None:
            if self._by_module:
                self.owners.note_gradients(self._model, self._updates.updated())
            self._step.optimizer_begins()
            self._window.backward_ends()

    def _optimizer_ends(self, *_: object) -> None:
        """A step without an engine ends here, as for the live tracer: nobody knows whether gradients are kept."""
        if self._step is None:
            return
        self._step.optimizer_ends()
        if not self._scan.engines:
            self.step_is_over()

    def step_is_over(self) -> None:
        """Ends the step that is looked at; nothing where it is over."""
        if self._step is None or not self._step.stepped:
            return
        if self._by_module:
            self.owners.note_states(self._model, self._updates.updated(), self._optimizer.state)
        self.marks, self.batch = self._step.ends(), self._step.batch()
        self.timeline = self._window.close()
        self._step = None
        assert self.timeline is not None, "a simulation loses no events"

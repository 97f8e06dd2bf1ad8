"""The step in progress: what happened so far, until it is frozen into a StepRecord."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memtrace.attribution.inputs import shape_of, tokens_of
from memtrace.attribution.timeline import StepMarks
from memtrace.record.breakdown import AllocatorReading, BatchShape
from memtrace.record.categories import Moment, Phase

_MOST_READS = 4096
"""Readings and phases that are kept of one step: a step that never ends has no end of them."""


@dataclass(slots=True, kw_only=True)
class StepInProgress:
    """Marks and readings of one step. Times are nanoseconds of the clock of the events, `now_ns`.

    The forward pass ends when the last tensor is saved for it: a loss outside the model belongs to it. The backward
    pass ends where the first optimizer begins or, where optimizers step inside the backward pass or call a closure, or
    an engine converts the gradients first, or no optimizer is stepped, with the last gradient. Where networks take
    turns within a step, these are the forward and the backward pass of the last turn.
    """

    number: int
    read: Callable[[], AllocatorReading | None]
    now_ns: Callable[[], int] = time.time_ns
    spent_ns: int = 0
    """What memtrace had taken of the training thread before the step; nanoseconds."""
    begin_ns: int = field(init=False)
    recorded: bool | None = None
    """Whether the step ends as a traced record; None until its first forward pass."""
    phases: list[tuple[int, Phase]] = field(default_factory=list)
    readings: dict[Moment, AllocatorReading] = field(default_factory=dict)
    reads: list[AllocatorReading] = field(default_factory=list)
    """Every reading of the step in order, the first one before its first forward pass."""
    before_forward: AllocatorReading | None = None
    forward_added: int | None = None
    """Bytes that the forward pass which added most has added, by the counters; None where there are none."""
    prepares_gradients: bool = False
    """Whether an engine converts gradients between the last one and the optimizer's step."""
    stepped: bool = False
    """Whether an optimizer has stepped."""
    entered_by: int | None = None
    """Identity of the module that was called first: each of its calls is a forward pass of one micro batch."""
    marks: StepMarks | None = None
    """Set when the step is over."""
    micro_batches: int = 0
    """Forward passes so far, the one at work included."""
    lost: bool = False
    """Whether its window has outgrown what one step may take, and was given up."""
    traced_from: int | None = None
    """Number of the micro batch that a trace begins with, from 1; None where it has the whole step."""
    awaits_end: bool = False
    """Whether torch will tell of the end of the backward pass at work, which updates parameters."""
    updated: bool = False
    """Whether such a backward pass has ended."""
    _in_forward: bool = False
    _in_optimizer: bool = False
    _turned: bool = False
    """Whether a forward pass has ended since an optimizer has begun."""
    _shape: tuple[int, ...] | None = None
    _tokens: int = 0
    _largest: int = 0
    _forward_end_ns: int | None = None
    _last_pack_ns: int | None = None
    _optimizer_ns: int | None = None
    _last_gradient_ns: int | None = None
    _backward_ends_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin_ns = self.now_ns()

    @property
    def phase(self) -> Phase:
        """The part of the step that is at work. What follows the model's forward pass counts as the backward pass."""
        if not self.phases:
            return Phase.OUTSIDE
        last = self.phases[-1][1]
        return Phase.BACKWARD if last is Phase.FORWARD and not self._in_forward else last

    def enter(self, phase: Phase) -> None:
        """Notes that a phase begins now."""
        if not self.phases or self.phases[-1][1] is not phase:
            if len(self.phases) >= _MOST_READS:
                del self.phases[:-1]
            self.phases.append((self.now_ns(), phase))

    def resumes(self, phase: Phase, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> None:
        """Notes where a step is that was not followed from its beginning, and its last micro batch."""
        self.enter(phase)
        self._in_forward = phase is Phase.FORWARD
        self.micro_batches = 1
        if shape is not None and dtype is not None:
            self._shape, self._tokens = shape, tokens_of(shape, dtype)
            self._largest = self._tokens

    def forward_goes_on(self) -> None:
        """Notes that the forward pass is at work, by another call than the first one of the micro batch."""
        self.enter(Phase.FORWARD)
        self._in_forward, self.awaits_end = True, False

    def forward_begins(self, batch: torch.Tensor | None) -> None:
        """Notes a forward pass of the model on one micro batch."""
        self.forward_goes_on()
        self.micro_batches += 1
        self.before_forward = self._reading()
        if batch is not None:
            shape = shape_of(batch)
            tokens = tokens_of(shape, batch.dtype)
            self._tokens += tokens
            if self._shape is None or tokens > self._largest:
                self._shape, self._largest = shape, tokens

    def forward_ends(self) -> None:
        """Notes the end of the model's forward pass."""
        self._in_forward = False
        self._turned = self._turned or not self._in_optimizer  # else it is inside of its closure
        self._forward_end_ns = self._last_pack_ns = self.now_ns()
        self._note(Moment.FORWARD_END)
        before, after = self.before_forward, self.readings.get(Moment.FORWARD_END)
        if before is None or after is None or before.requested_bytes is None or after.requested_bytes is None:
            return
        self.forward_added = max(self.forward_added or 0, after.requested_bytes - before.requested_bytes)

    def packed(self) -> None:
        """Notes that a tensor was saved for the backward pass."""
        if self.phases and self.phases[-1][1] is Phase.FORWARD:
            self._last_pack_ns = self.now_ns()

    def backward_runs(self) -> None:
        """Notes that the backward pass is at work: a saved tensor was asked for."""
        if self.phases and self.phases[-1][1] is not Phase.BACKWARD:
            self.enter(Phase.BACKWARD)

    def gradients_accumulated(self) -> None:
        """Notes that a gradient was added to `.grad`."""
        self._backward_has_run()
        self.backward_runs()
        self._last_gradient_ns = self.now_ns()

    def backward_ends(self) -> None:
        """Notes that a backward pass has ended and has added its last gradient."""
        self.gradients_accumulated()
        self._backward_ends_ns.append(self.now_ns())

    def _backward_has_run(self) -> None:
        """Notes what nothing has told: the backward pass has been at work since the end of the forward pass."""
        if self.phases and self.phases[-1][1] is Phase.FORWARD and self._forward_end_ns is not None:
            self.phases.append((max(self._forward_end_ns, self._last_pack_ns or 0), Phase.BACKWARD))

    def optimizer_begins(self) -> None:
        """Notes that an optimizer begins its step."""
        self._backward_has_run()
        self._in_optimizer = True
        if self._optimizer_ns is None or self._turned:
            self._turned = False
            self._optimizer_ns = self.now_ns()
            self._note(Moment.BACKWARD_END)
        self.enter(Phase.OPTIMIZER)

    def optimizer_ends(self, *, inside_backward: bool = False) -> None:
        """Notes that an optimizer has stepped, maybe inside of a backward pass that goes on now."""
        self.stepped, self._in_optimizer = True, False
        self.enter(Phase.BACKWARD if inside_backward else Phase.OUTSIDE)

    def ends(self) -> StepMarks:
        """Returns the marks of the finished step; of a counted one nothing but its begin and end is asked for."""
        self._note(Moment.STEP_END)
        if self.recorded is False:
            return StepMarks(begin_ns=self.begin_ns, end_ns=self.now_ns())
        forward_end = max((t for t in (self._forward_end_ns, self._last_pack_ns) if t is not None), default=None)
        inside = self.prepares_gradients or self._optimizer_ns is None or self._steps_inside_backward()
        backward_end = self._last_gradient_ns if inside and self._last_gradient_ns is not None else self._optimizer_ns
        counters = {
            moment: reading.requested_bytes
            for moment, reading in self.readings.items()
            if reading.requested_bytes is not None
            and not (moment is Moment.BACKWARD_END and inside)
            and not (moment is Moment.FORWARD_END and forward_end != self._forward_end_ns)
        }
        return StepMarks(
            begin_ns=self.begin_ns,
            end_ns=self.now_ns(),
            forward_end_ns=forward_end,
            backward_end_ns=backward_end,
            phases=tuple(self.phases),
            backward_ends_ns=tuple(self._backward_ends_ns),
            counters=counters,
        )

    def batch(self) -> BatchShape | None:
        """Returns the shape of the step's batch; None where the model saw no tensor."""
        if self._shape is None:
            return None
        return BatchShape(shape=self._shape, tokens=self._tokens, largest_micro_batch_tokens=self._largest)

    def allocations(self) -> int | None:
        """Returns how often the step has allocated, by the counters; None where there are none."""
        counts = [reading.allocations for reading in (*self.reads[:1], *self.reads[-1:])]
        first, last = counts or (None, None)
        return None if first is None or last is None else last - first

    def _steps_inside_backward(self) -> bool:
        """Whether gradients still came after the first optimizer had begun."""
        last, optimizer = self._last_gradient_ns, self._optimizer_ns
        return last is not None and optimizer is not None and last > optimizer

    def _note(self, moment: Moment) -> None:
        reading = self._reading()
        if reading is not None:
            self.readings[moment] = reading

    def _reading(self) -> AllocatorReading | None:
        reading = self.read()
        if reading is not None:
            if len(self.reads) >= _MOST_READS:
                del self.reads[1:-1]
            self.reads.append(reading)
        return reading

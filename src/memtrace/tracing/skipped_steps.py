"""Steps that are skipped: counted, and nothing else, where steps are so short that records would take too much."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

import torch
from torch import nn

from memtrace.attribution.inputs import shape_of, tokens_of
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.guard import Guard
from memtrace.record.categories import Phase
from memtrace.sources.autograd_torch_private import after_backward, backward_is_running, current_autograd_node
from memtrace.sources.hooks import Apart, outside_graphs, unless_whole
from memtrace.sources.torch_private import is_jit_tracing, leave_out_of_graphs
from memtrace.tracing.cycle import Cycle
from memtrace.tracing.dropped import DroppedGradients
from memtrace.tracing.schedule import TraceSchedule

Hook = Callable[..., None]

ENDLESS = 512
"""Forward passes of one step after which memtrace says that it does not end."""

_TIMED_EVERY = 8
"""Of so many steps that are skipped, one is timed and stands for all: two looks at the clock are among the dearest
things that are done in one. Fewer than this at a time are not timed."""

_CALLS = nn.modules.module.__file__
"""Where torch calls a module, and its hooks also when it has raised."""


class SkippedSteps:
    """The steps until the next record.

    A step that is skipped reads no counter and makes no record. What a report of a failure says of the step is
    noted all the same.

    These are the hooks that run most often of all, in steps of less than a millisecond. Calls are what takes time
    there, with caches that the training has filled: so each hook is one function, which sets plain attributes and calls
    hardly anything. All else is done by what it goes on to, under the guard. That is also what torch's compiler sees of
    a hook on the model.

    Args:
        scan: knows whether there is one optimizer or more.
        cycle: knows when a step is over.
        guard: knows what memtrace has taken so far, apart from these hooks.
        explicit: whether the loop tells where steps begin and end.
        main_input_name: of the argument that gives a batch its shape; None where the model does not say.
    """

    __slots__ = (  # the hooks read ten of them in each step: so they lie side by side
        "_alone",
        "_cycle",
        "_dtype",
        "_explicit",
        "_guard",
        "_hears",
        "_inside",
        "_largest_tokens",
        "_looked_at",
        "_main_input_name",
        "_next",
        "_over",
        "_phase",
        "_planned_ns",
        "_scan",
        "_shape",
        "_spent_ns",
        "_unheard",
        "_updated",
        "done",
        "dropped",
        "left",
        "number",
        "passes",
        "seconds",
    )

    def __init__(self, scan: Scan, cycle: Cycle, guard: Guard, *, explicit: bool, main_input_name: str | None) -> None:
        self._scan, self._cycle, self._guard = scan, cycle, guard
        self.dropped = DroppedGradients(scan)
        """Knows whether the loop has dropped what a step was for."""
        self._explicit, self._main_input_name = explicit, main_input_name or ""
        self.left = 0
        """How many steps are still to be skipped, the one at work included."""
        self.done = 0
        """How many steps have been skipped."""
        self.number: int | None = None
        """Number of the step that is being skipped; None between steps."""
        self.passes = 0
        """Forward passes of the step that is being skipped."""
        self._looked_at = ENDLESS
        """How many of them there may be until somebody looks whether the step is endless."""
        self.seconds = 0.0
        """What memtrace took for the steps that were skipped last."""
        self._alone = False
        """Whether a step is over as soon as any optimizer has stepped."""
        self._hears = False
        """Whether a gradient is heard of while steps are skipped: `dropped.hears`, where the hooks read it."""
        self._inside = False
        """Whether an optimizer has stepped inside the backward pass at work."""
        self._over = False
        """Whether that backward pass has ended: it is the end of the step, unless the loop steps an optimizer too."""
        self._updated = False
        """Whether such a backward pass of the step at work has ended."""
        self._unheard = False
        """Whether the step at work has begun without a forward pass of the model."""
        self._spent_ns = 0
        self._planned_ns = 0
        self._next = 1
        self._largest_tokens = 0
        self._phase = Phase.OUTSIDE
        self._shape: tuple[int, ...] | None = None
        self._dtype: torch.dtype | None = None

    @property
    def spent_ns(self) -> int:
        """What memtrace has taken so far, with its share in steps that were skipped; nanoseconds."""
        return self._guard.spent_ns + self._spent_ns

    def around_forward(self, before: Hook, after: Hook, *, breaks_graphs: bool) -> tuple[Hook, Hook]:
        """Returns the hooks before and after each forward pass of the model, for outside of graphs and for inside.

        Args:
            before: what the first goes on to, with (module, args, kwargs).
            after: what the second goes on to, with (module, output, what was raised).
            breaks_graphs: whether they may break a graph of torch's compiler to be heard.
        """
        goes_on, ended = unless_whole(before, breaks_graphs), unless_whole(_told_apart(after), breaks_graphs)
        begins, ends = self._before_forward(goes_on), self._after_forward(ended)
        for hook in (begins, ends):
            leave_out_of_graphs(hook)
        return Apart(begins, in_graphs=goes_on), Apart(ends, in_graphs=ended)

    def _before_forward(self, goes_on: Hook) -> Hook:
        """Returns the hook before each forward pass outside of graphs.

        It notes the forward passes of steps that are skipped, as far as it can tell at a glance that the batch is
        not larger than any with a record, and goes on with all others.
        """

        named, explicit = self._main_input_name, self._explicit
        outside, forward, dropped = Phase.OUTSIDE, Phase.FORWARD, self.dropped
        records_gradients, is_traced, timed_every = torch.is_grad_enabled, is_jit_tracing, _TIMED_EVERY

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
            if kwargs is None:  # taken off in this call by a hook before it: see `unless_whole`
                return
            if self.left and not self._over and (self.number is not None or not explicit):
                begin_ns = 0 if self.left % timed_every else perf_counter_ns()
                batch = kwargs.get(named) if kwargs else None
                if batch is None and args:
                    batch = args[0]
                if (
                    type(batch) is torch.Tensor
                    and not (self.passes and (self.passes >= self._looked_at or dropped.is_worth_a_look))
                    and records_gradients()
                    and not is_traced()
                    and (self._phase is outside or current_autograd_node() is None)
                ):
                    try:
                        shape = batch.shape
                    except RuntimeError:  # a nested tensor has none
                        shape = None
                    as_before = shape is not None and shape == self._shape
                    if as_before or (shape is not None and batch.numel() <= self._largest_tokens):
                        if not as_before:
                            self._shape, self._dtype = shape, batch.dtype
                        self._phase, self._inside = forward, False
                        self.number = self.number or self._next
                        self.passes += 1
                        if self._hears:
                            dropped.forward_begins()
                        if begin_ns:
                            self._spent_ns += (perf_counter_ns() - begin_ns) * timed_every
                        return
            goes_on(module, args, kwargs)

        return hook

    def _after_forward(self, goes_on: Hook) -> Hook:
        """Returns the hook after each forward pass outside of graphs."""

        forward, backward = Phase.FORWARD, Phase.BACKWARD

        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if self.left and output is not None:
                if self._phase is forward:  # else it was not one of the step, but an evaluation
                    self._phase = backward
                return
            goes_on(module, args, output)

        return hook

    def before_optimizer(self, optimizer: torch.optim.Optimizer, otherwise: Hook) -> Hook:
        """Returns the hook before each step of an optimizer; `otherwise` gets the optimizer."""

        explicit, stepping, gradient = self._explicit, Phase.OPTIMIZER, self.dropped.gradient
        otherwise = outside_graphs(otherwise)
        alive = weakref.ref(optimizer)  # torch names the one that is stepped, which may be a wrapper with its hooks

        def hook(stepped: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.left and not self._over:
                self._phase = stepping
                if self._hears:
                    gradient.has_come = False
                if self.number is None and not explicit:
                    self.number, self._unheard = self._next, True
            else:
                otherwise(alive())

        leave_out_of_graphs(hook)
        return hook

    def after_optimizer(self, optimizer: torch.optim.Optimizer, otherwise: Hook) -> Hook:
        """Returns the hook after each step of an optimizer; `otherwise` gets the optimizer.

        It ends a step that is skipped, but for the last one: unless the loop tells where steps end, or more than
        this optimizer has to step. One whose own `step` calls that of its base class may be told of twice. Of those
        that step inside a backward pass, where each parameter may have one, the first is all there is to know.
        """
        outside, backward, dropped = Phase.OUTSIDE, Phase.BACKWARD, self.dropped
        otherwise = outside_graphs(otherwise)
        alive = weakref.ref(optimizer)

        def hook(stepped: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._alone and self.left > 1 and self.number is not None and not (self._hears and dropped.in_a_row):
                self.left -= 1
                self.done += 1
                self._next += 1
                self.number = None
                self.passes = 0
                self._phase = outside
            elif self._inside and self.left and current_autograd_node() is not None:
                self._phase = backward
            else:
                otherwise(alive())

        leave_out_of_graphs(hook)
        return hook

    def plan(self, schedule: TraceSchedule, *, following: int) -> None:
        """Passes over as many steps from now on as the schedule says, unless one has a larger batch than any record.

        Args:
            schedule: when there are records.
            following: number of the next step, where the loop does not tell it.
        """
        self.left, self._next = schedule.steps_to_pass(), following
        self._largest_tokens = schedule.largest_tokens
        self._alone = not self._explicit and self._scan.ends_with_any
        self._planned_ns, self.seconds = self.spent_ns, 0.0
        if self.left:
            self.dropped.rest()
            self._hears = self.dropped.hears

    def hasten(self) -> None:
        """Passes over no step after the one at work."""
        if self.number is None:
            self.stop()
        else:
            self.left = 1

    def stop(self) -> int | None:
        """Passes over no more, also not what is left of the step at work; returns its number."""
        if self._over:
            self.step_ends()
        number = self.number
        if self.left:
            self.left = 0
            self._finish()
        return number

    def begins(self, number: int | None) -> None:
        """Notes that the loop begins a step, with its own number if it has one."""
        self.number = number or self._next

    def takes(self, batch: torch.Tensor | None) -> bool:
        """Notes a forward pass of a step that is skipped.

        Returns:
            False where none is: there are no such steps now, or its batch is larger than any with a record.
        """
        if self._over or (self.passes and self.dropped.look() and self.dropped.end_step()):
            self.step_ends()
        self.dropped.forward_begins()
        if not self.left:
            self.dropped.listen()
            return False
        self._hears = self.dropped.hears
        shape, dtype = None, None
        if batch is not None:
            shape, dtype = shape_of(batch), batch.dtype
            if tokens_of(shape, dtype) > self._largest_tokens:
                return False
        self.number = self.number or self._next
        if self.passes >= self._looked_at:
            self._looked_at += ENDLESS
        self.passes += 1
        self._shape, self._dtype, self._phase, self._inside = shape, dtype, Phase.FORWARD, False
        return True

    def optimizer_begins(self) -> bool:
        """Notes that an optimizer begins its step; returns whether that is in a step that is skipped."""
        if self._over and self._unheard and backward_is_running():
            self.step_ends()
        self._over = False  # a second loss of the same step, or an optimizer that the loop steps
        if self.left:
            self._phase, self._unheard = Phase.OPTIMIZER, self._unheard or self.number is None
            self.number = self.number or self._next
        return bool(self.left)

    def optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes that an optimizer has stepped, which may end a step that is skipped; nothing where none is."""
        self._phase = Phase.OUTSIDE
        if not self._explicit and self.number is not None:
            over = self._cycle.stepped(optimizer)
            self.dropped.stepped()
            if self.updated():
                return
            self._over = self._updated
            if over:
                self.step_ends()

    def updated(self) -> bool:
        """Notes that something was updated; returns whether the end of a backward pass will be the end of the step."""
        if self.number is not None and not self._inside:
            self._inside = after_backward(self._guard.wrap(self._backward_ended))
        return self._inside

    def _backward_ended(self) -> None:
        self._updated = self._over = self._inside
        self._inside, self._phase = False, Phase.OUTSIDE

    def step_ends(self) -> None:
        """Counts a step."""
        self.left -= 1
        self.done += 1
        self._next += 1
        self._cycle.ends()
        self._forget()
        if not self.left:
            self._finish()

    def in_progress(self) -> StepInProgress | None:
        """Returns what is known of the step that is being skipped; None between steps."""
        if self.number is None:
            return None
        step = StepInProgress(number=self.number, read=lambda: None)
        step.resumes(self._phase, self._shape, self._dtype)
        return step

    def _forget(self) -> None:
        self.number = None
        self._inside = self._over = self._updated = self._unheard = False
        self.passes, self._looked_at = 0, ENDLESS

    def _finish(self) -> None:
        self._forget()
        self._phase = Phase.OUTSIDE
        self.seconds = (self.spent_ns - self._planned_ns) / 1e9


def _told_apart(after: Hook) -> Hook:
    """Returns the hook after a forward pass that goes on with (module, output, what the model has raised).

    A model may return None, and within the handling of some other exception: its own is the one that torch has caught
    where it calls modules.
    """

    def ended(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        error = sys.exception() if output is None else None
        caught = None if error is None or error.__traceback__ is None else error.__traceback__.tb_frame.f_code
        after(module, output, error if caught is not None and caught.co_filename == _CALLS else None)

    return ended

"""Updates inside the backward pass: what ends a step that no loop ends by a step of its optimizer."""

from __future__ import annotations

import torch

from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.guard import Guard
from memtrace.sources.autograd_torch_private import after_backward, backward_is_running
from memtrace.sources.hooks import HookSet
from memtrace.tracing.current_step import CurrentStep
from memtrace.tracing.cycle import Cycle

_IN_VAIN = 3
"""Forward passes without a step of any optimizer after which memtrace looks for somebody else who takes gradients."""


class UpdatesInBackward:
    """Ends the steps of trainings that update their parameters inside the backward pass.

    There each parameter may have an optimizer of its own, and those of parts that are not used do not step: the step
    is over with the backward pass in which one of them has stepped, unless one that is stepped by the loop follows
    before the next forward pass. So it is where hooks on gradients update and no optimizer is stepped by anybody
    (LOMO): memtrace sees that after three forward passes, which are one step then.

    Args:
        scan: knows whose gradients somebody takes.
        cycle: knows which optimizers a step waits for.
        guard: runs all that is called by torch.
        current: the step at work.
    """

    def __init__(self, scan: Scan, cycle: Cycle, guard: Guard, current: CurrentStep) -> None:
        self._scan, self._cycle, self._guard, self._current = scan, cycle, guard, current
        self._dropped = current.skipped.dropped
        self._is_stepped = self._listens = False

    def begins(self) -> bool:
        """Notes that an optimizer begins its step; returns whether the step at work was over before that."""
        self._is_stepped, self._dropped.gradient.has_come = True, False
        step = self._current.step
        if step is None or step.marks is None:
            return False
        if backward_is_running() and not step.micro_batches:
            return True
        step.marks = None  # a second loss of the same step, or an optimizer that the loop steps
        return False

    def ends(self, step: StepInProgress, optimizer: torch.optim.Optimizer) -> bool:
        """Notes that an optimizer has stepped; returns whether the step of the training is over now."""
        over = self._cycle.stepped(optimizer)
        self._dropped.stepped()
        if self._awaits_end(step):
            return False
        if over or step.updated:
            step.marks = step.ends()
        return over

    def look(self, step: StepInProgress | None, hooks: HookSet) -> bool:
        """Looks whether the step is over though no optimizer has stepped; call before each forward pass.

        It is where the loop has dropped its gradients. Now and then, as long as no optimizer is stepped, memtrace looks
        for hooks that take gradients: where there are some, the step is over, and each from now on with its backward
        pass.
        Not where an engine has the gradients: it keeps them elsewhere, while it accumulates.
        """
        if step is not None:
            if self._dropped.look() and self._dropped.end_step():
                step.marks = step.ends()
                return True
            self._dropped.forward_begins()
        if self._is_stepped or self._listens or self._scan.engines:
            return False
        if step is None or not step.micro_batches or step.micro_batches % _IN_VAIN:
            return False
        taken = self._scan.taken()
        if taken is not None:
            self._listens = True
            step.marks = step.ends()
            hooks.after_gradient([taken], self._guard.wrap(self._taken), first=True)
        return self._listens

    def _awaits_end(self, step: StepInProgress) -> bool:
        """Returns whether something was updated inside a backward pass whose end will be told."""
        step.awaits_end = backward_is_running() and (
            step.awaits_end or after_backward(self._guard.wrap(self._backward_ended))
        )
        return step.awaits_end

    def _taken(self, _: torch.Tensor) -> None:
        if self._is_stepped:
            return
        step = self._current.step
        if step is None:
            self._current.skipped.updated()
        else:
            self._awaits_end(step)

    def _backward_ended(self) -> None:
        step = self._current.step
        if step is not None and step.awaits_end:
            step.awaits_end, step.updated = False, True
            step.marks = step.ends()

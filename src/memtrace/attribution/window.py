"""One window of events with everything that tags blocks while it is open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

import torch
from torch import nn

from memtrace.attribution.activations import ActivationTags
from memtrace.attribution.engines import Engine
from memtrace.attribution.hidden import known_hidden, tag_hidden, tag_workspaces
from memtrace.attribution.inputs import batch_tensors
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.leftovers import Leftovers
from memtrace.attribution.scan import Scan
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.attribution.timeline import Timeline, replay
from memtrace.attribution.window_thread import WindowThread
from memtrace.guard import Guard
from memtrace.record.categories import Category
from memtrace.sources.autograd_torch_private import after_backward, backward_is_running
from memtrace.sources.events import EventSource, TagEvent
from memtrace.sources.gradient_hooks import weakly
from memtrace.sources.hooks import HookSet
from memtrace.sources.saved_tensors import SavedTensors, saved_tensors

MAX_NOTES = 400_000
"""Tags and deaths that are noted in one window at most; each takes about 100 B."""

HearsSaved = Callable[[torch.Tensor, Sequence[TagEvent]], None]
"""Is told of each tensor that is saved for backward, while it is alive, with the tags of its storages."""


class TraceWindow:
    """Opens a source, tags what autograd saves and accumulates, and replays the window when it is closed.

    A source that is open already when memtrace is attached (a window from birth, begun before the model was built)
    stays open until the first step that is to be traced ends: nothing was there before it, so that a block that
    nobody claims cannot hide.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        scan: Scan,
        source: EventSource,
        ledger: Ledger,
        guard: Guard,
        current_step: Callable[[], StepInProgress | None],
        may_end: Callable[[TraceWindow], None] = lambda _: None,
        trace_activations: bool = True,
        hears_saved: HearsSaved | None = None,
    ) -> None:
        self._scan, self._source, self._ledger, self._guard = scan, source, ledger, guard
        self._current_step, self._may_end = current_step, may_end
        self._trace_activations, self._hears_saved = trace_activations, hears_saved
        self.leftovers = Leftovers(ledger.device, ledger.coordinates)
        """What traced steps have left behind."""
        self._hooks = HookSet()
        self._base: Sequence[TagEvent] = ()
        self._tags: ActivationTags | None = None
        self._saved = self._listener()
        self._forward_passes, self._begin_seconds = 0, 0.0
        self._other_steps: dict[int, int] = {}
        """Steps of each optimizer of somebody else since the model was called last, by its identity."""
        self._thread = WindowThread(model, source, guard)
        self.is_whole = True
        """Whether all of the step so far has run on threads that the source hears."""
        self._awaits_end = False
        """Whether torch will tell of the end of the backward pass at work, and of what engines do there."""

    @property
    def is_open(self) -> bool:
        """Whether blocks are being tagged."""
        return self._tags is not None

    @property
    def saved(self) -> Sequence[TagEvent]:
        """The tensors saved for backward since the window began; their storages may be gone. Empty without a window."""
        return () if self._tags is None else self._tags.notes

    def adopt(self) -> bool:
        """Goes on with a source that was opened before memtrace was attached; returns whether there is one."""
        if not self._source.is_open:
            return False
        self._thread.begin()
        self._ledger.begin_journal()
        self._scan.claim_persistent(self._ledger, anew=False)
        self._install()
        return True

    def open(self, expected_allocations: int | None = None) -> bool:
        """Looks at all persistent storages anew and begins a window; False where the source cannot record now.

        Args:
            expected_allocations: see `EventSource.open`.
        """
        self._thread.let_go(self._saved)
        self._thread.begin()
        expected = () if expected_allocations is None else (expected_allocations,)
        if not self._source.open(*expected):
            return False
        self._ledger.clear(keep=Category.INPUTS)
        self._scan.claim_persistent(self._ledger)
        self._ledger.begin_journal()
        self._base = [*self._ledger.live(), *known_hidden(self._scan.hidden())]
        self._install()
        return True

    def forward_begins(self, *, hooked: bool = True) -> None:
        """Puts saved-tensor hooks on for a forward pass, if `hooked`; without a window, takes off what is left."""
        self._saved.listening, self._awaits_end = True, False
        self._other_steps.clear()
        if self._is_heard() and self.is_open and hooked and self._trace_activations:
            self._saved.push()
        elif not self.is_open:
            self._thread.let_go(self._saved)

    @property
    def seconds(self) -> float:
        """How long it has been open."""
        return monotonic() - self._begin_seconds

    @property
    def other_steps(self) -> int:
        """The most steps that one optimizer of somebody else has made since the model was called last."""
        return max(self._other_steps.values(), default=0)

    def outgrown(self, forward_passes: int) -> bool:
        """Notes a forward pass, and returns whether the open window has more than one step may have.

        Those of another thread, which may evaluate beside the training, are not counted.

        Args:
            forward_passes: how many of the model one step may have, those without gradients included.
        """
        self._forward_passes += self._thread.is_here
        return self._forward_passes > forward_passes or self._has_many_notes

    @property
    def _has_many_notes(self) -> bool:
        return len(self.saved) + self._ledger.journal_length > MAX_NOTES

    def forward_ends(self, output: object) -> None:
        """Takes off what hears of saved tensors where the user's own hooks lie below; else a loss may still follow."""
        if self.is_open:
            self._saved.forward_ended(batch_tensors(output))
            self.leftovers.note(batch_tensors(output))
        if self._saved.covers_user_hooks:
            self._saved.pop()

    def leaves_thread(self) -> None:
        """Takes it off at the end of a forward pass on any thread but the main one.

        That thread may have been made for this forward pass alone, and nobody could take it off there later. What a
        loss saves is then known by its life.
        """
        if threading.current_thread() is not threading.main_thread():
            self._saved.pop()

    def backward_ends(self, inside: torch.optim.Optimizer | None = None) -> None:
        """Claims the gradients before an optimizer uses them.

        Also after a backward pass whose end was told: they may have been made anew since.

        Args:
            inside: the optimizer, where it steps inside the backward pass, which goes on: it is one of many.
        """
        self._saved.listening = True
        self._is_heard()
        if inside is not None and not self._scan.engines:
            self._scan.claim_gradients_of(inside, self._ledger)
        else:
            self._saved.pop()
            self._scan.claim_gradients(self._ledger)

    def close(self) -> Timeline | None:
        """Ends the window and replays it; None where the source lost events, or has not heard a part of the step."""
        tags = self._tags
        if tags is None or not self._is_heard() or not self.is_whole:
            self.abandon()
            return None
        self._scan.claim_persistent(self._ledger, anew=False)
        notes = tags.notes
        self._uninstall()
        window = self._source.close() if self._source.is_open else None  # a thread beside this one may have ended it
        journal = self._ledger.end_journal()
        base, self._base = self._base, ()
        if window is None or not window.complete:
            return None
        timeline = replay(window, base, [*notes, *journal])
        for hidden in self._scan.hidden():
            tag_hidden(timeline.lifetimes, hidden)
        tag_workspaces(timeline.lifetimes, self._scan.workspace_sizes(), window.streams)
        self._scan.recognise(timeline.lifetimes, self._ledger)
        return timeline

    def abandon(self) -> None:
        """Takes everything off and forgets the window; safe at any time.

        Inside a backward pass the recording and the saved-tensor hooks cannot come off, and a thread that the source
        does not hear leaves all to the window's own: with the model's next forward pass, or when this is called again.
        """
        if self.is_open and not self._thread.is_here and not self._source.hears_this_thread():
            self.is_whole = False
            self._ledger.end_journal()  # nobody will read it, and the window's own thread may never come back
            self._thread.later(self._saved, self._leave)
        else:
            self._take_off()

    def _listener(self) -> SavedTensors:
        """Returns what learns of saved tensors. Engines that shard weights put others in their place."""
        wrap, self._replaces = self._guard.wrap, bool(self._scan.engines)
        return saved_tensors(wrap(self._packed), wrap(self._unpacked), wrap(self._kept), replaces=self._replaces)

    def release(self) -> None:
        """Takes everything off for good; what autograd still holds of this window refers to nothing of it."""
        self._take_off()
        self._saved.forget()

    def rest(self) -> Callable[[], None]:
        """Returns what takes off, when it is called, what a release had to leave, as `abandon` does; keeps nothing."""
        return self._thread.rest()

    def _install(self) -> None:
        self._tags = ActivationTags(self._scan.held, self._ledger.device, self._ledger.coordinates)
        self.leftovers.begin()
        self._forward_passes = 0
        self._other_steps.clear()
        self._begin_seconds, self.is_whole = monotonic(), True
        self._thread.forget()
        self._hooks.before_any_step(self._any_steps)
        if self._replaces != bool(self._scan.engines):
            self._saved = self._listener()
        # Most gradients are there when the backward pass has ended: torch calls a parameter's hooks in each step from
        # then on, also when there are none any more.
        passing = self._scan.passing_gradients() if self._trace_activations else self._scan.gradient_leaves()
        # Hooks of the loop may take it; those of an engine make of it what is there at the end of the backward pass.
        first = all(engine.leaves_gradients for engine in self._scan.engines)
        self._hooks.after_gradient(passing, weakly(self._gradient_comes), first=first)
        for engine, module in self._scan.gathering():
            gathered = partial(self._gathered, engine)
            self._hooks.before_forward(module, self._guard.wrap(gathered), prepend=False)

    def _uninstall(self) -> None:
        self._tags = None
        self._saved.pop()
        self._hooks.close()

    def _take_off(self) -> None:
        elsewhere = not self._thread.is_here and (self.is_open or self._source.is_open)
        self._uninstall()
        self._ledger.end_journal()
        self._base = ()
        if elsewhere or (backward_is_running() and (self._saved.is_on or self._source.is_open)):
            self._thread.later(self._saved, self._leave)
        if not backward_is_running():
            self._thread.let_go(self._saved)

    def _leave(self) -> None:
        if not self.is_open or not self.is_whole:
            self.abandon()

    def _is_heard(self) -> bool:
        """Returns whether the source hears what this thread does in the step; else the window is in vain."""
        if not self.is_open or self._source.hears_this_thread():
            return True
        if self.is_whole:
            self.is_whole = False
            self._may_end(self)
        return False

    def _packed(self, tensor: torch.Tensor) -> torch.Tensor | None:
        step, tags = self._current_step(), self._tags  # another thread may end the window meanwhile
        if tags is None or step is None:
            return None
        self._pack(tags, tensor)
        step.packed()
        stand_in = None
        if self._scan.engines:
            self._ledger.note(tensor)
            self._scan.claim_passing(self._ledger)
            stand_in = self._scan.saved_as(tensor)
        if self._source.interrupted() or self._has_many_notes:
            self.abandon()
        return stand_in

    def _kept(self, kept: object) -> None:
        """Tags what hooks of the user keep in place of a saved tensor, as far as it is on the device."""
        tags = self._tags
        if tags is not None:
            for tensor in batch_tensors(kept):
                self._pack(tags, tensor)

    def _pack(self, tags: ActivationTags, tensor: torch.Tensor) -> None:
        before = len(tags.notes)
        tags.pack(tensor)
        if self._hears_saved is not None:
            self._hears_saved(tensor, tags.notes[before:])

    def _unpacked(self, tensor: torch.Tensor | None) -> bool:
        """Notes that the backward pass is at work; returns whether that is all there is to know of it."""
        step = self._current_step()
        self._is_heard()
        if self._tags is None or step is None:
            return False
        step.backward_runs()
        if self._scan.engines and tensor is not None:
            self._claim_role(tensor)
            self._scan.claim_passing(self._ledger)
            return False
        self._awaits_end = self._awaits_end or after_backward(self._guard.wrap(self._backward_ended))
        return self._awaits_end

    def _any_steps(self, optimizer: object) -> None:
        self._guard.run(self._optimizer_steps, optimizer)

    def _optimizer_steps(self, optimizer: object) -> None:
        """Counts steps of optimizers that memtrace was not given: does the training go on that this window is for?

        Not those inside a backward pass, where each parameter may have one, nor those of another thread, which may
        train beside this one.
        """
        if not self._thread.is_here:
            return
        ours = any(optimizer is one or optimizer in self._scan.parts_of(one) for one in self._scan.optimizers)
        if not ours and not backward_is_running():
            self._other_steps[id(optimizer)] = self._other_steps.get(id(optimizer), 0) + 1
            self._may_end(self)

    def _gathered(self, engine: Engine, module: nn.Module, *args: object) -> None:
        if self._tags is not None:
            engine.claim_gathered(module, self._ledger)

    def _claim_role(self, tensor: torch.Tensor) -> None:
        """Claims what an engine has put together again for the backward pass."""
        role = self._scan.role_of(tensor) if isinstance(tensor, nn.Parameter) else None
        if role is None:
            self._ledger.note(tensor)
        else:
            self._ledger.claim(tensor, role.category, role.component)

    def _backward_ended(self) -> None:
        """Claims what a backward pass has left, and hears the next one."""
        self._saved.listening, self._awaits_end = True, False
        step = self._current_step()
        if self._tags is not None and step is not None:
            self._scan.backward_ended(self._ledger)
            step.backward_ends()

    def _gradient_comes(self, parameter: torch.Tensor) -> None:
        self._guard.run(self._gradient, parameter)

    def _gradient(self, parameter: torch.Tensor) -> None:
        step = self._current_step()
        self._is_heard()
        if self._tags is None or step is None:
            return
        if parameter.grad is not None:
            self._ledger.claim(parameter.grad, Category.GRADIENTS)
        if self._scan.engines:
            self._claim_role(parameter)
            self._scan.claim_passing(self._ledger)
        if self._scan.prepares_gradients:
            told = self._awaits_end or after_backward(self._guard.wrap(self._engine_ended), last=True)
            self._awaits_end = told
        step.gradients_accumulated()
        if self._source.interrupted():
            self.abandon()

    def _engine_ended(self) -> None:
        """Claims what an engine has made of the gradients at the end of a backward pass, before it converts that."""
        self._awaits_end = False
        if self._tags is not None:
            self._scan.claim_gradients(self._ledger)

"""Which modules the bytes belong to: those that made activations, and those whose parameters states are kept for."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from memtrace.attribution.storages import state_tensors, storages_of
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.hooks import HookSet

_POSITION = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Span(NamedTuple):
    """From this time on, until the next span, the named module runs; an empty name is code outside of the model."""

    time_ns: int
    name: str


class ModuleSpans:
    """Notes which module runs when."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.spans: list[Span] = []
        self._now_ns = now_ns
        self._running: list[str] = []

    def watch(self, model: nn.Module, hooks: HookSet) -> None:
        """Installs the hooks that note every module of the model; the model itself is called by its class."""
        for name, module in model.named_modules():
            hooks.before_forward(module, partial(self._enter, name or type(model).__name__))
            hooks.after_forward(module, self._leave)

    def _enter(self, name: str, *_: object) -> None:
        self._running.append(name)
        self.spans.append(Span(self._now_ns(), name))

    def _leave(self, *_: object) -> None:
        self._running.pop()
        self.spans.append(Span(self._now_ns(), self._running[-1] if self._running else ""))


class Owners:
    """Notes whose parameters a block belongs to: weights, their copies, gradients and optimizer states."""

    def __init__(self, address_of: Callable[[torch.UntypedStorage], int]) -> None:
        self.modules: dict[int, str] = {}
        """The module by the address of the block; an empty name where several modules share it."""
        self._address_of = address_of

    def note_gradients(self, model: nn.Module, updated: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> None:
        """Notes the gradients that there are now, of parameters and of what the optimizer updates for them."""
        names = _modules_of(model, model.named_parameters())
        for parameter, copy in updated:
            for held in (parameter.grad, copy.grad):
                self._note(held, names.get(parameter, ""))

    def note_states(
        self,
        model: nn.Module,
        updated: Iterable[tuple[nn.Parameter, torch.Tensor]],
        states: Mapping[torch.Tensor, object],
    ) -> None:
        """Notes parameters and buffers, the optimizer's copies and what it keeps for each."""
        names = _modules_of(model, model.named_parameters())
        for tensor, name in (names | _modules_of(model, model.named_buffers())).items():
            self._note(tensor, name)
        for parameter, copy in updated:
            name = names.get(parameter, "")
            self._note(copy, name)
            for _, held in state_tensors(states.get(copy)):
                self._note(held, name)

    def _note(self, tensor: torch.Tensor | None, module: str) -> None:
        if tensor is None:
            return
        for storage, _, _ in storages_of(tensor, DEVICE):
            address = self._address_of(storage)
            shared = self.modules.setdefault(address, module) != module
            if shared:
                self.modules[address] = ""


def _modules_of(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[torch.Tensor, str]:
    return {tensor: name.rpartition(".")[0] or type(model).__name__ for name, tensor in tensors}


def holdings(
    timeline: Timeline, marks: StepMarks, spans: Sequence[Span], owners: Mapping[int, str]
) -> dict[Moment, dict[EntryKey, dict[str, int]]]:
    """Returns the bytes of each kind of module in each entry, at each moment of a step; they add up to its breakdown.

    A block belongs to the module of its parameter, else to the innermost module that was running when it was allocated.
    Paths have `*` for positions in lists; the name is empty for blocks of no module, such as those of the optimizer's
    step and of the backward pass.
    """
    begins = [span.time_ns for span in spans]
    positions = timeline.positions(marks)
    ordered = sorted(set(positions.values()))
    held: list[dict[EntryKey, dict[str, int]]] = [{} for _ in ordered]
    for key, life, start, stop in timeline.stretches(marks, ordered):
        index = bisect_right(begins, life.begin_ns)
        made = spans[index - 1].name if index else ""
        kind = _POSITION.sub("*", owners.get(life.address, made))
        for at in range(start, stop):
            sizes = held[at].setdefault(key, {})
            sizes[kind] = sizes.get(kind, 0) + life.nbytes
    return {moment: held[ordered.index(position)] for moment, position in positions.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Activations that modules of one kind made."""

    name: str
    """Path of the modules, with `*` for positions in lists; empty for code outside of the model, such as a loss."""
    modules: int
    """How many modules of this path made any."""
    nbytes: int


def activation_holders(timeline: Timeline, spans: Sequence[Span], time_ns: int) -> list[Holding]:
    """Returns who made the activations that are alive at a time, the largest holder first.

    A tensor belongs to the innermost module that was running when it was allocated, whoever saved it.
    """
    begins = [span.time_ns for span in spans]
    position = timeline.position(time_ns)
    sizes: dict[str, int] = {}
    makers: dict[str, set[str]] = {}
    for life in timeline.lifetimes:
        alive = life.begin < position and (life.end is None or life.end >= position)
        if not alive or life.tag is None or life.tag.category is not Category.ACTIVATIONS:
            continue
        index = bisect_right(begins, life.begin_ns)
        maker = spans[index - 1].name if index else ""
        kind = _POSITION.sub("*", maker)
        sizes[kind] = sizes.get(kind, 0) + life.nbytes
        makers.setdefault(kind, set()).add(maker)
    holders = [Holding(name=kind, modules=len(makers[kind]), nbytes=size) for kind, size in sizes.items()]
    return sorted(holders, key=lambda holding: (-holding.nbytes, holding.name))

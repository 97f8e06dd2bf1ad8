"""Which modules the bytes belong to: those that made blocks, and those whose parameters states are kept for."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from memtrace.attribution.storages import state_tensors, storages_of
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.autograd_torch_private import next_node
from memtrace.sources.hooks import HookSet

_POSITION = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Span(NamedTuple):
    """From this time on, until the next span, the named module runs; an empty name is code outside of the model."""

    time_ns: int
    name: str
    node: int = 0
    """Number of the first node of autograd that is made in the span; numbers only grow."""


@dataclass(frozen=True, slots=True)
class Makers:
    """Tells which module made a block."""

    spans: Sequence[Span]
    nodes: Sequence[tuple[int, int | None]] = ()
    """Which node of autograd runs its backward pass, from when on: time and number, None outside of all nodes."""

    def at(self, time_ns: int) -> str:
        """Returns the innermost module that runs at a time; in the backward pass the one that made the running node.

        A module that a checkpoint runs again in the backward pass runs. Empty for code outside of the model: the loss
        and its nodes, what gathers the gradients of parameters, the optimizer's step.
        """
        running = self.spans[index - 1].name if (index := _after(self.spans, time_ns, 0)) else ""
        if running or not (index := _after(self.nodes, time_ns, 0)):
            return running
        number = self.nodes[index - 1][1]
        if number is None or not (index := _after(self.spans, number, 2)):
            return ""
        return self.spans[index - 1].name


def _after(rows: Sequence[tuple[Any, ...]], value: int, column: int) -> int:
    """Returns how many rows, which are sorted by a column, do not come after a value."""
    return bisect_right(rows, value, key=itemgetter(column))


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
        self._note()

    def _leave(self, *_: object) -> None:
        self._running.pop()
        self._note()

    def _note(self) -> None:
        self.spans.append(Span(self._now_ns(), self._running[-1] if self._running else "", next_node()))


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
    timeline: Timeline, marks: StepMarks, makers: Makers, owners: Mapping[int, str]
) -> dict[Moment, dict[EntryKey, dict[str, int]]]:
    """Returns the bytes of each kind of module in each entry, at each moment of a step; they add up to its breakdown.

    A block belongs to the module of its parameter, else to the one that made it. Paths have `*` for positions in lists;
    the name is empty for blocks of no module, such as those of the optimizer's step.
    """
    positions = timeline.positions(marks)
    ordered = sorted(set(positions.values()))
    held: list[dict[EntryKey, dict[str, int]]] = [{} for _ in ordered]
    for key, life, start, stop in timeline.stretches(marks, ordered):
        owner = owners.get(life.address)
        kind = _POSITION.sub("*", makers.at(life.begin_ns) if owner is None else owner)
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


def activation_holders(timeline: Timeline, makers: Makers, time_ns: int) -> list[Holding]:
    """Returns who made the activations that are alive at a time, the largest holder first, whoever saved them."""
    position = timeline.position(time_ns)
    sizes: dict[str, int] = {}
    holders: dict[str, set[str]] = {}
    for life in timeline.lifetimes:
        alive = life.begin < position and (life.end is None or life.end >= position)
        if not alive or life.tag is None or life.tag.category is not Category.ACTIVATIONS:
            continue
        holder = makers.at(life.begin_ns)
        kind = _POSITION.sub("*", holder)
        sizes[kind] = sizes.get(kind, 0) + life.nbytes
        holders.setdefault(kind, set()).add(holder)
    found = [Holding(name=kind, modules=len(holders[kind]), nbytes=size) for kind, size in sizes.items()]
    return sorted(found, key=lambda holding: (-holding.nbytes, holding.name))

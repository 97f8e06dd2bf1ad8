"""Which modules made the activations that wait for the backward pass."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from memtrace.attribution.timeline import Timeline
from memtrace.record.categories import Category
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
        """Installs the hooks that note every module of the model; the model itself is called `model`."""
        for name, module in model.named_modules():
            hooks.before_forward(module, partial(self._enter, name or "model"))
            hooks.after_forward(module, self._leave)

    def _enter(self, name: str, *_: object) -> None:
        self._running.append(name)
        self.spans.append(Span(self._now_ns(), name))

    def _leave(self, *_: object) -> None:
        self._running.pop()
        self.spans.append(Span(self._now_ns(), self._running[-1] if self._running else ""))


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

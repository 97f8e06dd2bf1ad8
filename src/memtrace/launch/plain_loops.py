"""Loops that no framework runs: a tracer is attached when each optimizer of a training has stepped once."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from memtrace.adapters import forgotten
from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.attribution.optimizers.finding import wrapping_chain
from memtrace.config import TracerConfig
from memtrace.errors import MemTraceError
from memtrace.guard import Guard
from memtrace.launch.owners import Training, training_of

logger = logging.getLogger("memtrace")

_PATIENCE = 16
"""Steps of one optimizer after which those that have not stepped are not waited for."""


class PlainLoops:
    """Attaches a tracer to each training whose optimizers step while no other tracer is attached in this process.

    A step that was begun before is no whole one: the first record is that of the next. So the tracer is attached right
    after the step of the optimizer, and where several take turns, when each of them has stepped.

    What it attaches ends with the training: optimizers are held weakly, and with the first one that is dropped the
    tracer is detached, unless it is collected on another thread: then with the model. It gives way to the tracer of
    anybody else, and does not take over from it when that has ended.

    Args:
        guard: runs what is called when an optimizer is dropped.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._tracer: Callable[[], MemoryTracer | None] = _none
        self._known: dict[int, Callable[[], Any]] = {}
        """The optimizers that need no look: those that are followed, and those that cannot be."""
        self._others: dict[int, Callable[[], Any]] = {}
        """Those that have stepped under a tracer of somebody else, or that a framework's callback answers for."""
        self._turns: _Turns | None = None
        """Which optimizers are waited for."""

    def stepped(self, optimizer: Any) -> None:
        """Takes in that an optimizer has stepped."""
        tracer = self._tracer()
        if forgotten.are_attached(besides=tracer):
            self.leave([optimizer])
            return
        is_known = _has(self._known, optimizer) or _has(self._others, optimizer)
        training = None
        if self._turns is None or not self._turns.know(optimizer):
            if is_known:
                return
            training = training_of(optimizer)
            if training is None:
                self._knows(optimizer)
                logger.warning(
                    "memtrace: no module has the parameters of this %s: its steps are not traced; "
                    "MemTraceOptimizer(optimizer, model) traces them",
                    type(optimizer).__name__,
                )
                return
            self._turns = _Turns(training)
        if self._turns.are_over_with(optimizer):
            turns, self._turns = self._turns, None
            optimizers = turns.taken()
            if training is None or len(optimizers) < len(training.stepping):
                training = training_of(optimizers[0], among=optimizers)
            if training is not None:
                self._attach(training)

    def leave(self, optimizers: Iterable[Any]) -> None:
        """Gives way to the tracer of some optimizers, and leaves them to it, also when it has ended."""
        self.give_way()
        for optimizer in optimizers:
            if not _has(self._others, optimizer):
                for part in wrapping_chain(optimizer):
                    self._others = _with(self._others, part)

    def give_way(self) -> None:
        """Detaches the tracer, since somebody else traces from now on."""
        tracer, self._tracer, self._turns = self._tracer(), _none, None
        self._known.clear()
        if tracer is not None:
            tracer.give_way()

    def _attach(self, training: Training) -> None:
        self.give_way()
        for optimizer in (*training.stepping, *training.parts):
            self._knows(optimizer)
        try:
            tracer = MemoryTracer(training.model, training.given, TracerConfig())
            tracer.attach()
        except MemTraceError as error:
            logger.warning("memtrace: this run is not traced, training goes on: %s", error)
            return
        self._tracer = weakref.ref(tracer)
        for optimizer in training.stepping:
            weakref.finalize(optimizer, self._dropped, weakref.ref(tracer), threading.get_ident()).atexit = False

    def _knows(self, optimizer: Any) -> None:
        self._known = _with(self._known, optimizer)

    def _dropped(self, tracer: Callable[[], MemoryTracer | None], thread: int) -> None:
        """Ends a tracer whose optimizer is gone, so that the model can go too; a collector may call from any thread."""
        ended = tracer()
        if ended is not None and threading.get_ident() == thread:
            if self._tracer() is ended:
                self._tracer = _none
                self._known.clear()
            self._guard.run(ended.detach)


class _Turns:
    """The optimizers of a training, until each has stepped; until one has stepped often, if some do not.

    Args:
        training: what was found when the first one had stepped. Its optimizers are held weakly, its model not at all.
    """

    def __init__(self, training: Training) -> None:
        self._alive = {id(one): weakref.ref(one) for one in (*training.stepping, *training.parts)}
        self._awaited = {id(one) for one in training.stepping}
        self._steps: Counter[int] = Counter()

    def know(self, optimizer: Any) -> bool:
        """Whether this is one of them, or is wrapped by one of them."""
        return self._alive.get(id(optimizer), _none)() is optimizer

    def are_over_with(self, optimizer: Any) -> bool:
        """Notes a step; returns whether nobody is waited for any more.

        Of one that wraps others its own step counts, or a second one of theirs, where the loop steps them alone.
        """
        self._steps[id(optimizer)] += 1
        awaited = {key for key in self._awaited if self._alive[key]() is not None}
        is_part = id(optimizer) not in awaited
        if is_part and self._steps[id(optimizer)] == 1:
            return False
        return is_part or self._steps[id(optimizer)] >= _PATIENCE or awaited <= self._steps.keys()

    def taken(self) -> list[Any]:
        """Returns those that have stepped and are still there."""
        alive = (self._alive[key]() for key in self._steps)
        return [optimizer for optimizer in alive if optimizer is not None]


def _has(known: Mapping[int, Callable[[], Any]], optimizer: Any) -> bool:
    return known.get(id(optimizer), _none)() is optimizer


def _with(known: Mapping[int, Callable[[], Any]], optimizer: Any) -> dict[int, Callable[[], Any]]:
    """Returns those that are alive, and one more, all held weakly."""
    alive = {key: one for key, one in known.items() if one() is not None}
    return {**alive, id(optimizer): weakref.ref(optimizer)}


def _none() -> None:
    """Stands for a reference where there is none."""

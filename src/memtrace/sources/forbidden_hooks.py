"""Where saved-tensor hooks are forbidden, as inside `torch.func.grad`: memtrace's are off while they are."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from memtrace.sources.autograd_torch_private import around_forbidding
from memtrace.sources.torch_private import around_compilation


class Pair(Protocol):
    """A pair of saved-tensor hooks that is on the stack of a thread."""

    def steps_aside(self) -> bool:
        """Leaves the stack of this thread, where it is the innermost pair there; returns whether it has."""

    def steps_back(self) -> None:
        """Goes on the stack again."""


class Forbidding:
    """Puts pairs aside while saved-tensor hooks are forbidden: torch would raise where there are some.

    Also while torch's compiler is at work, which forbids them by itself. There is one a process, since torch has one
    such function, which is as torch has made it while no pair is on. Pairs are held weakly: one may go with its thread.
    Any thread may call, and a collector any time.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, weakref.ref[Pair]] = {}
        """Those that are on, the innermost one of each thread last."""
        self._ends: tuple[Callable[[], None], ...] = ()
        self._changes = threading.RLock()
        """Held while pairs change: a collector may end one within another one's change."""

    def goes_on(self, pair: Pair) -> None:
        """Puts the pair aside from now on."""
        key = id(pair)
        known = weakref.ref(pair, lambda gone: self._forget(key, gone))
        with self._changes:
            self._pairs[key] = known
            if not self._ends:
                self._ends = around_compilation(self._forbidden), around_forbidding(self._forbidden)

    def goes_off(self, pair: Pair) -> None:
        """Leaves the pair alone from now on."""
        self._forget(id(pair), self._pairs.get(id(pair)))

    def _forget(self, key: int, reference: weakref.ref[Pair] | None) -> None:
        with self._changes:
            if self._pairs.get(key) is reference:  # else another pair has its identity
                self._pairs.pop(key, None)
            if not self._pairs:
                ends, self._ends = self._ends, ()
                for end in ends:
                    end()

    def forked(self) -> None:
        """Goes on in a child process: a thread that is not there may have been about to change pairs."""
        self._changes = threading.RLock()

    @contextmanager
    def _forbidden(self) -> Iterator[None]:
        aside: list[Pair] = []
        for reference in reversed([*self._pairs.values()]):
            pair = reference()
            if pair is not None and pair.steps_aside():
                aside.append(pair)
        try:
            yield
        finally:
            while aside:
                aside.pop().steps_back()


FORBIDDING = Forbidding()
"""The one of this process."""

os.register_at_fork(after_in_child=FORBIDDING.forked)

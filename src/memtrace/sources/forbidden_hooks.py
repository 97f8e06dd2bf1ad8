"""Where saved-tensor hooks are forbidden, as inside `torch.func.grad`: memtrace's are off while they are."""

from __future__ import annotations

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
    """

    def __init__(self) -> None:
        self._pairs: dict[int, weakref.ref[Pair]] = {}
        """Those that are on, the innermost one of each thread last. Never changed: a collector may end one any time."""
        self._ends: list[Callable[[], None]] = []
        """What ends hearing of it, of which a second call does nothing."""

    def goes_on(self, pair: Pair) -> None:
        """Puts the pair aside from now on."""
        key = id(pair)
        self._pairs = {**self._pairs, key: weakref.ref(pair, lambda gone: self._forget(key, gone))}
        if not self._ends:
            self._ends.append(around_compilation(self._forbidden))
            self._ends.append(around_forbidding(self._forbidden))

    def goes_off(self, pair: Pair) -> None:
        """Leaves the pair alone from now on; a second call does what Ctrl-C has kept the first from."""
        self._forget(id(pair), self._pairs.get(id(pair)))

    def _forget(self, key: int, reference: weakref.ref[Pair] | None) -> None:
        if self._pairs.get(key) is reference:  # else another pair has its identity
            self._pairs = {other: known for other, known in self._pairs.items() if other != key}
        if not self._pairs:
            ends = self._ends
            while ends:
                ends[-1]()
                ends.pop()

    @contextmanager
    def _forbidden(self) -> Iterator[None]:
        aside: list[Pair] = []
        for reference in reversed(self._pairs.values()):
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

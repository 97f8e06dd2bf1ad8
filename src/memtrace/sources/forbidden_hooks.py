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

    There is one a process, since torch has one such function, which is as torch has made it while no pair is on, and
    while torch's compiler looks at it. Pairs are held weakly: one may go with its thread.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, weakref.ref[Pair]] = {}
        """Those that are on, the innermost one of each thread last. Never changed: a collector may end one any time."""
        self._leaves_torch: Callable[[], None] | None = None
        self._leaves_compiler: Callable[[], None] = _nothing

    def goes_on(self, pair: Pair) -> None:
        """Puts the pair aside from now on."""
        key, begins = id(pair), not self._pairs
        self._pairs = {**self._pairs, key: weakref.ref(pair, lambda gone: self._forget(key, gone))}
        if begins:
            self._leaves_compiler = around_compilation(self._compiling)
        self._stands_in()

    def goes_off(self, pair: Pair) -> None:
        """Leaves the pair alone from now on."""
        self._forget(id(pair), self._pairs.get(id(pair)))

    def _forget(self, key: int, reference: weakref.ref[Pair] | None) -> None:
        if self._pairs.get(key) is reference:  # else another pair has its identity
            self._pairs = {other: known for other, known in self._pairs.items() if other != key}
        if not self._pairs:
            leaves, self._leaves_compiler = self._leaves_compiler, _nothing
            leaves()
            self._steps_down()

    def _stands_in(self) -> None:
        if self._leaves_torch is None:
            self._leaves_torch = around_forbidding(self._forbidden)

    def _steps_down(self) -> None:
        leaves, self._leaves_torch = self._leaves_torch, None
        if leaves is not None:
            leaves()

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

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        with self._forbidden():
            self._steps_down()
            try:
                yield
            finally:
                if self._pairs:
                    self._stands_in()


def _nothing() -> None:
    """Stands for what ends something that has not begun."""


FORBIDDING = Forbidding()
"""The one of this process."""

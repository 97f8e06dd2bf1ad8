"""What of torch must not meet hooks of memtrace, on modules or on saved tensors: they are off while it is at work."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

from memtrace.sources.autograd_torch_private import around_forbidding
from memtrace.sources.torch_private import around_compilation, around_what_takes_no_hooks

Aside = Callable[[], AbstractContextManager[Any]]
"""Returns what has hooks off as long as it is entered."""


class Asides:
    """Puts the hooks of its subscribers aside while something of torch is at work, which is told by functions of torch.

    There is one a process of each kind, since torch has one of each such function. They are as torch has made them
    while there is no subscriber. Subscribers are held weakly: one may go with its thread. Any thread may call, and a
    collector any time.

    Args:
        around: each enters a context while something is at work, from now on, and returns what ends that.
    """

    def __init__(self, *around: Callable[[Aside], Callable[[], None]]) -> None:
        self._put_around = around
        self._subscribers: dict[int, weakref.WeakMethod[Aside]] = {}
        self._numbers = count(1)
        self._ends: list[Callable[[], None]] = []
        """Of which a second call does nothing."""
        self._changes = threading.RLock()
        """Held while subscribers change: a collector may end one within another one's change."""
        os.register_at_fork(after_in_child=self._forked)

    def subscribe(self, aside: Aside) -> Callable[[], None]:
        """Enters what a bound method returns while that is at work, from now on; returns what ends it.

        A second call of that does what Ctrl-C has kept the first from.
        """
        number = next(self._numbers)
        known = weakref.WeakMethod(aside, lambda _: self._leaves(number))
        with self._changes, ExitStack() as in_vain:
            in_vain.callback(self._leaves, number)
            self._subscribers[number] = known
            if not self._ends:
                for put in self._put_around:
                    self._ends.append(put(self._around))
            in_vain.pop_all()
        return partial(self._leaves, number)

    def _leaves(self, number: int) -> None:
        with self._changes:
            self._subscribers.pop(number, None)
            if not self._subscribers:
                while self._ends:  # where Ctrl-C comes, who leaves again ends the rest
                    self._ends[-1]()
                    self._ends.pop()

    def _forked(self) -> None:
        """Goes on in a child process: a thread that is not there may have been about to change subscribers."""
        self._changes = threading.RLock()

    @contextmanager
    def _around(self) -> Iterator[None]:
        with ExitStack() as asides:
            for known in reversed([*self._subscribers.values()]):  # of a stack the innermost ones first
                aside = known()
                if aside is not None:
                    asides.enter_context(aside())
            yield


HOOKLESS = Asides(around_what_takes_no_hooks)
"""Of hooks on modules, which `torch.jit.script` would compile and `torch.cuda.make_graphed_callables` refuses: both do
as without memtrace, and so does what they make. Forward passes that another thread runs meanwhile are not heard."""

FORBIDDING = Asides(around_compilation, around_forbidding)
"""Of hooks on saved tensors, where torch would raise: where they are forbidden, as inside `torch.func.grad`, and while
its compiler is at work, which forbids them by itself."""

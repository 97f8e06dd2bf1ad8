"""What of torch takes no module with hooks, `torch.jit.script` and graphed callables: memtrace's are off meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from memtrace.sources import torch_private

Aside = Callable[[], AbstractContextManager[Any]]
"""Returns what has hooks off as long as it is entered."""


class Hookless:
    """Puts the hooks of its subscribers aside while torch makes something of a module that must have none.

    `torch.jit.script` would compile them, `torch.cuda.make_graphed_callables` refuses them: both do as without
    memtrace, and so does what they make. There is one a process, since torch has one of each such function. They are
    as torch has made them while there is no subscriber. Subscribers are held weakly. Forward passes that another thread
    runs meanwhile are not heard.
    """

    def __init__(self) -> None:
        self._subscribers: dict[int, weakref.WeakMethod[Aside]] = {}
        self._count = 0
        self._end: Callable[[], None] | None = None

    def subscribe(self, aside: Aside) -> Callable[[], None]:
        """Enters what a bound method returns while no module may have hooks, from now on; returns what ends that."""
        self._count += 1
        number = self._count
        self._subscribers = {**self._subscribers, number: weakref.WeakMethod(aside, lambda _: self._leaves(number))}
        if self._end is None:
            self._end = torch_private.around_what_takes_no_hooks(self._around)
        return lambda: self._leaves(number)

    def _leaves(self, number: int) -> None:
        # A new dictionary: Python's collector may end a subscriber while another one is gone through.
        self._subscribers = {other: aside for other, aside in self._subscribers.items() if other != number}
        if not self._subscribers and self._end is not None:
            self._end()
            self._end = None  # not before: where Ctrl-C comes, who leaves again ends it

    @contextmanager
    def _around(self) -> Iterator[None]:
        with ExitStack() as asides:
            for known in self._subscribers.values():
                aside = known()
                if aside is not None:
                    asides.enter_context(aside())
            yield


HOOKLESS = Hookless()
"""The one of this process."""

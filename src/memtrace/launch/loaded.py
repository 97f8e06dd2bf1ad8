"""What is done once a module was loaded that trains: each function is called with the module, by `sitecustomize`.

What needs a framework is imported when something is trained: a process that trains nothing never pays for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memtrace.guard import Guard

if TYPE_CHECKING:
    from memtrace.launch.plain_loops import PlainLoops


class Launched:
    """What `memtrace run` has in a process that has loaded torch.

    A fault in it ends it, and nothing that begins later is traced; the script goes on. It lasts as long as the process.

    Args:
        strict: whether a fault is raised, for tests of memtrace itself.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.guard = Guard(lambda: None, strict=strict)
        self.handle: Any = None
        """Torch's, of the hook; None before torch is loaded."""
        self._hook: Callable[..., None] | None = None
        self._stepped: Callable[..., None] = self._looks
        self._loops: PlainLoops | None = None

    def torch(self, module: ModuleType) -> None:
        """Hears the end of each step of each optimizer, by torch's hook for all of them."""
        from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: PLC0415 - whoever imports loads torch

        def hook(optimizer: Any, args: object, kwargs: object) -> None:
            self._stepped(optimizer)

        self._hook = hook
        self.handle = register_optimizer_step_post_hook(hook)
        if "torch._dynamo" in sys.modules:  # it was loaded before torch was whole
            self.compiler(module)

    def compiler(self, module: ModuleType) -> None:
        """Leaves the hook out of graphs: a step that is compiled breaks there, as it does by itself."""
        from memtrace.sources.hooks import outside_graphs  # noqa: PLC0415 - see above
        from memtrace.sources.torch_private import leave_out_of_graphs  # noqa: PLC0415

        if self._hook is not None:
            leave_out_of_graphs(self._hook)
            self._stepped = outside_graphs(self._looks)

    def trainer(self, module: ModuleType) -> None:
        """Puts a callback among those that every Hugging Face Trainer begins with, after Trainer's own."""
        if DefaultCallback not in module.DEFAULT_CALLBACKS:
            module.DEFAULT_CALLBACKS.append(DefaultCallback)

    def swift(self, module: ModuleType) -> None:
        """Does so again once ms-swift (4) has put a list of its own in the place of Trainer's."""
        if "transformers.trainer" in sys.modules:
            self.trainer(sys.modules["transformers.trainer"])

    def _looks(self, optimizer: Any) -> None:
        self.guard.run(self._follow, optimizer)

    def _follow(self, optimizer: Any) -> None:
        self._plain_loops().stepped(optimizer)

    def _plain_loops(self) -> PlainLoops:
        if self._loops is None:
            from memtrace.launch.plain_loops import PlainLoops  # noqa: PLC0415 - torch is whole by now

            self._loops = PlainLoops(self.guard)
        return self._loops

    def leave(self, optimizers: Iterable[Any]) -> None:
        """Ends the tracers of plain loops, since a framework's callback takes over, and leaves its optimizers to it."""
        self.guard.run(lambda: self._plain_loops().leave(optimizers))

    def give_way(self) -> None:
        """Ends the tracers of plain loops."""
        if self._loops is not None:
            self.guard.run(self._loops.give_way)


LAUNCHED = Launched(strict=os.environ.get("MEMTRACE_STRICT", "0") == "1")
"""The one of this process."""


class DefaultCallback:
    """Stands among Trainer's default callbacks; each Trainer makes one, and gets a `RunCallback`."""

    def __new__(cls) -> Any:
        """Returns the callback; one that does nothing where it cannot be made."""
        made = LAUNCHED.guard.run(_callback)
        if made is None:
            from transformers import TrainerCallback  # noqa: PLC0415

            made = TrainerCallback()
        return made


def _callback() -> Any:
    from memtrace.launch.trainer import RunCallback  # noqa: PLC0415 - transformers is whole by now

    return RunCallback()


def call(function: str, module: ModuleType) -> None:
    """Calls the function of a module that was loaded."""
    LAUNCHED.guard.run(getattr(LAUNCHED, function), module)

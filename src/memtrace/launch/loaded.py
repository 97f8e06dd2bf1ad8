"""What is done once a module was loaded that trains: each function is called with the module, by `sitecustomize`.

It is called while torch itself, or the framework, is still being loaded: what needs them is imported when something is
trained, and a process that trains nothing never pays for it.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memtrace.guard import Guard

if TYPE_CHECKING:
    from memtrace.launch.plain_loops import PlainLoops

logger = logging.getLogger("memtrace")


class Launched:
    """What `memtrace run` has in a process: at most one, made when torch's optimizers are loaded.

    A fault in it ends it, and no more is traced; the script goes on. It lasts as long as the process.
    """

    def __init__(self) -> None:
        self.guard = Guard(lambda: None)
        self._loops: PlainLoops | None = None

    def trainer(self, module: ModuleType) -> None:
        """Puts a callback among those that every Hugging Face Trainer begins with, after Trainer's own."""
        module.DEFAULT_CALLBACKS.append(DefaultCallback)

    def optimizers(self, module: ModuleType) -> None:
        """Hears the end of each step of each optimizer, by torch's hook for all of them."""
        module.register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, *_: object) -> None:
        self.guard.run(self._follow, optimizer)

    def _follow(self, optimizer: Any) -> None:
        if self._loops is None:
            from memtrace.launch.plain_loops import PlainLoops  # noqa: PLC0415 - torch is whole by now

            self._loops = PlainLoops(self.guard)
        self._loops.stepped(optimizer)

    def give_way(self) -> None:
        """Ends the tracers of plain loops, since a framework's callback takes over."""
        if self._loops is not None:
            self.guard.run(self._loops.give_way)


LAUNCHED = Launched()
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

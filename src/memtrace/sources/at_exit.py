"""What must be ended before the interpreter is: torch ends a recording badly that is still on then."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any


def at_exit(method: Callable[[], Any]) -> Callable[[], None]:
    """Calls a bound method when the interpreter exits, unless its object is gone; returns what takes that back."""
    alive = weakref.WeakMethod(method)

    def end() -> None:
        found = alive()
        if found is not None:
            found()

    atexit.register(end)
    return partial(atexit.unregister, end)

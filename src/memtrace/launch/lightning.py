"""What Lightning's Trainers ask for callbacks, by an entry point under each of Lightning's two names."""

from __future__ import annotations

import os
from typing import Any

from memtrace.launch.command import VARIABLE
from memtrace.launch.loaded import LAUNCHED


def callbacks() -> list[Any]:
    """Returns the callback for a Trainer that is being made under `memtrace run`; elsewhere none."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return []
    made = LAUNCHED.guard.run(_callback)
    return [] if made is None else [made]


def _callback() -> Any:
    from memtrace.launch.lightning_callback import RunLightningCallback  # noqa: PLC0415 - only where it is asked for

    return RunLightningCallback()

"""The pytest plugin: the fixture `memory_plan`. It imports nothing of torch before a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def memory_plan() -> Callable[..., Any]:
    """Returns a function that plans a training step without a GPU: see `memtrace.memory_plan`."""
    import memtrace  # noqa: PLC0415 - torch takes seconds

    return memtrace.memory_plan

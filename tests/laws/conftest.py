"""What the laws share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_objects_are_not_collected() -> Iterator[None]:
    """Takes everything that imports have made out of garbage collection.

    A run from birth collects garbage first, so that no old model is freed in it: 1 ms instead of 0.4 s each time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

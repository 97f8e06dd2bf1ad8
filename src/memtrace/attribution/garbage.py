"""Python's garbage collector, kept from running where memtrace makes many objects that do not live long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the collector from running inside the block; afterwards it is on or off as before.

    The events of one step are thousands of tuples that are gone some milliseconds later, none of them in a cycle. To
    the collector they look like a program that grows: with it on, one step in twenty of a small Llama had a full
    collection, which walks everything that the training holds for 200 ms. It is off in all threads of the process.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Leaves what is there out of collections inside the block, which then cost by what was made within it.

    Where somebody has frozen objects, which no call tells apart, nothing is left out.
    """
    frozen = gc.get_freeze_count() > 0
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()

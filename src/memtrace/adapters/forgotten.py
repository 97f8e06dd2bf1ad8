"""Tracers that a script or a notebook cell has dropped without a detach: collected when the next one begins.

A model holds its hooks, and they hold tracer and model: nobody but Python's collector ends that. Where a cell is run
again, or a loop makes one model after another, it may come long after the next model has filled the device.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import nn

from memtrace.sources.hooks import HookSet

_ATTACHED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The tracers of this process that are attached."""


def begins(tracer: object) -> None:
    """Notes that a tracer is attached, and collects those before it that are dropped."""
    if are_attached(besides=tracer):
        gc.collect()
    _ATTACHED.add(tracer)


def ends(tracer: object) -> None:
    """Notes that a tracer is detached."""
    _ATTACHED.discard(tracer)


def are_attached(besides: object) -> bool:
    """Whether tracers are attached in this process, one left out."""
    return any(other is not besides for other in _ATTACHED)


def collect_in_forward(tracer: object, model: nn.Module) -> HookSet:
    """Returns a hook that collects once more in the model's next forward pass, if other tracers are attached.

    By then `optimizer = MemTraceOptimizer(...)` has dropped the one before, which it still had while this one began.
    Takes some tenths of a second; where nothing else is attached, there is no hook.
    """
    hooks = HookSet()
    if are_attached(besides=tracer):

        def collect(*_: object) -> None:
            hooks.close()
            gc.collect()

        hooks.before_forward(model, collect)
    return hooks

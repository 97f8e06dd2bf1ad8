"""A callback that is taken off in the middle of a training: Trainer tells it nothing any more, its end included."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from transformers import Trainer, TrainerCallback

from memtrace.sources.hooks import HookSet


def when_taken_off(trainer: Trainer, callback: TrainerCallback, model: nn.Module, end: Callable[[], None]) -> HookSet:
    """Returns a hook that ends a run in the model's first forward pass after a Trainer has lost its callback.

    The list of callbacks stays as the user knows it: nothing is put into it. The hook comes off with the call, and
    without one where Trainer or callback are gone, as after a training that an exception has ended.

    Args:
        trainer: whose callback it is. Held weakly.
        callback: what may be taken off. Held weakly.
        model: the trained model.
        end: what is called, a bound method of the callback.
    """
    handler, expected = weakref.ref(trainer.callback_handler), weakref.ref(callback)
    method = weakref.WeakMethod(end)
    hooks = HookSet()

    def look(*_: object) -> None:
        known, sought, ends = handler(), expected(), method()
        if known is None or ends is None:
            hooks.close()
        elif not any(one is sought for one in known.callbacks):
            hooks.close()
            ends()

    hooks.before_forward(model, look)
    return hooks

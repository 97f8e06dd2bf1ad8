"""The Trainer that calls a callback, and the further models that it holds: reference, teacher, reward, value models."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback

from memtrace.attribution.models import holders
from memtrace.attribution.models.further import Find

_MAX_FRAMES = 16
"""Frames from a callback's method to the Trainer's, which calls it through its handler of callbacks."""


def models_of(trainer: Trainer | None) -> Find | None:
    """Returns what finds the further models of a Trainer; None where there is none.

    Trainer tells a callback of the trained model alone. Its own attributes have the others, as those of TRL's trainers
    do (`ref_model`, `teacher_model`, `reward_funcs`, `value_model`), and those of its callbacks may: each is known by
    the name of the attribute. The Trainer is held weakly.
    """
    if trainer is None:
        return None
    alive = weakref.ref(trainer)

    def find() -> Mapping[str, Any]:
        trainer = alive()
        if trainer is None:
            return {}
        return holders.models_of((*trainer.callback_handler.callbacks, trainer), trainer.model)

    return find


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """Returns the Trainer that calls this callback now; None where none does."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        first = frame.f_code.co_varnames[:1]
        if first == ("self",) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            local = frame.f_locals
            found = local.get("self")
            if type(local) is dict:  # until Python 3.13 a copy, which would keep all that it refers to until the return
                local.clear()
            if isinstance(found, Trainer) and any(one is callback for one in found.callback_handler.callbacks):
                return found
        frame = frame.f_back
    return None

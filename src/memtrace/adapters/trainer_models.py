"""The Trainer that calls a callback, and the further models that it holds: reference, teacher, reward, value models."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from memtrace.attribution.models.further import Find
from memtrace.guard import ask

_MAX_FRAMES = 16
"""Frames from a callback's method to the Trainer's, which calls it through its handler of callbacks."""
_MAX_MODELS = 8
"""Further models with a name of their own: each is a component of the weights."""
_MOST_PARTS = 256
"""Parts of a list or dictionary that is looked into. A dataset may be a list of millions."""


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
        return {} if trainer is None else _models(trainer)

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


def _models(trainer: Trainer) -> dict[str, Any]:
    """Returns the modules, and lists and dictionaries of modules, among the attributes of a Trainer and its callbacks.

    The trained model may be among them, also as a part of another.
    """
    found: dict[str, Any] = {}
    for holder in (*trainer.callback_handler.callbacks, trainer):
        for name, value in list((ask(vars, holder) or {}).items()):  # another thread may set one meanwhile
            modules = [part for part in ask(_parts, value) or () if issubclass(type(part), nn.Module)]
            is_trained = len(modules) == 1 and modules[0] is trainer.model
            if modules and not is_trained and (name in found or len(found) < _MAX_MODELS):
                found[name.lstrip("_") or name] = modules
    return found


def _parts(value: Any) -> list[Any]:
    """Returns the parts of a short list or dictionary, of a long one none: that is a dataset; else the value itself."""
    if not issubclass(type(value), (list, tuple, dict)):
        return [value]
    if len(value) > _MOST_PARTS:
        return []
    return list(value.values()) if issubclass(type(value), dict) else list(value)

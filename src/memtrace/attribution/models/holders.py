"""The further models that a framework holds, known by the names of the attributes that refer to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from memtrace.guard import ask

_MAX_MODELS = 8
"""Further models with a name of their own: each is a component of the weights."""
_MOST_PARTS = 256
"""Parts of a list or dictionary that is looked into. A dataset may be a list of millions."""
_OF_A_MODULE = frozenset({"_modules", "_parameters", "_buffers"})
"""Where a module has what belongs to it."""


def models_of(holders: Iterable[Any], trained: nn.Module | None) -> dict[str, list[nn.Module]]:
    """Returns the modules, and lists and dictionaries of modules, among the attributes of some objects, by name.

    The trained model may be among them, as a part of another.

    Args:
        holders: a Trainer, its callbacks. Of a module the attributes are looked at, and not its own parts.
        trained: the model that is trained, which is no further one.
    """
    found: dict[str, list[nn.Module]] = {}
    for holder in holders:
        for name, value in list((ask(vars, holder) or {}).items()):  # another thread may set one meanwhile
            if name in _OF_A_MODULE:
                continue
            modules = [part for part in ask(_parts, value) or () if issubclass(type(part), nn.Module)]
            is_trained = len(modules) == 1 and modules[0] is trained
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

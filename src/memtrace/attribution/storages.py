"""Which storages hold a tensor: views, sparse tensors and wrapper subclasses come down to plain storages."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from memtrace.guard import ask
from memtrace.sources import torch_private

StorageView = tuple[torch.UntypedStorage, int, torch.dtype]
"""A storage, its bytes, and the element type that the tensor on it has. Plain: a claim makes one and drops it."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types that need no further look: nearly all tensors, and each is looked at several times in a traced step."""
_STRIDED = torch.strided


def storages_of(tensor: torch.Tensor, device: torch.device) -> Sequence[StorageView]:
    """Returns each storage on `device` that holds a part of the tensor.

    A DTensor or a quantised tensor gives the storages of the tensors that it wraps, with their own element types, so
    that packed weights count what they take. Empty storages, opaque layouts (MKLDNN) and parameters of lazy modules
    before their first forward pass give nothing.
    """
    if type(tensor) not in _PLAIN and is_lazy(tensor):
        return ()
    if type(tensor) not in _PLAIN and torch_private.is_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = [getattr(tensor, name) for name in names]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]  # a DTensor names its mesh too
    elif tensor.layout is _STRIDED:
        if tensor.device != device:
            return ()
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a transform of torch.func has put something around it
            below = torch_private.under_transforms(tensor)
            return () if below is tensor else storages_of(below, device)
        nbytes = storage.nbytes()
        return ((storage, nbytes, tensor.dtype),) if nbytes else ()
    else:
        tensors = torch_private.sparse_parts(tensor)
    return [view for part in tensors for view in storages_of(part, device)]


def canonical_device(device: torch.device) -> torch.device:
    """Returns the device as tensors name it: `cuda` without an index is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


_MAX_DEPTH = 8
_NUMBERS = (str, bytes, bytearray, memoryview, range, array)
"""Sequences of the standard library that hold no tensor; some are very long."""


def state_tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (component, tensor) for every tensor in nested containers and objects.

    The component is the path of names to it, without positions: the third of a list `old_dirs` is `old_dirs`. What is
    reached in several ways is looked into once, by the first of them.
    """
    return _walk((value,), "", -1, set())


def _walk(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    # No function inside the other: one that calls itself is a cycle, left to the garbage collector for each state.
    if depth == _MAX_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    for name, part in _parts(value):
        below = f"{path}.{name}" if path and name else path or name
        if isinstance(part, torch.Tensor):
            yield below, part
        else:
            yield from _walk(part, below, depth + 1, seen)


def _parts(value: Any) -> Sequence[tuple[str, Any]]:
    """Returns what a container or an object holds, with its name; parts without one have an empty name.

    Numbers in a row hold nothing, and what cannot be gone through is unknown.
    """
    return () if isinstance(value, _NUMBERS) else ask(_listed, value) or ()


def _listed(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(key if isinstance(key, str) else "", part) for key, part in value.items()]
    if isinstance(value, Sequence):
        return [("", part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not callable(value) else []

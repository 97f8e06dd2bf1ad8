"""The batch: its tensors, and the shape that activations follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from memtrace.attribution.ledger import Ledger
from memtrace.guard import ask
from memtrace.record.categories import Category

_MAX_DEPTH = 8
_PLAIN = (list, tuple, dict)


def batch_tensors(batch: object, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yields every tensor in sequences and mappings, in order, as far as eight levels deep: some hold themselves.

    What a container of the user's holds that cannot be gone through is unknown.
    """
    if isinstance(batch, torch.Tensor):
        yield batch
    elif depth < _MAX_DEPTH and isinstance(batch, (list, tuple, Mapping)):
        for item in contents(batch) if type(batch) in _PLAIN else ask(contents, batch) or ():
            yield from batch_tensors(item, depth + 1)


def contents(container: list[object] | tuple[object, ...] | Mapping[object, object]) -> list[object]:
    """Returns what a container holds; it may be the user's own, and raise anything."""
    return list(container.values() if isinstance(container, Mapping) else container)


def claim_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], ledger: Ledger) -> None:
    """Claims every tensor in the arguments of a forward pass as input."""
    for tensor in batch_tensors((args, kwargs)):
        ledger.claim(tensor, Category.INPUTS)


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], main_name: str | None) -> torch.Tensor | None:
    """Returns the tensor that gives the batch its shape.

    That is the argument called `main_name` (what transformers models call `main_input_name`), else the first tensor.
    """
    named = kwargs.get(main_name) if main_name is not None else None
    if isinstance(named, torch.Tensor):
        return named
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    return next(batch_tensors((args, kwargs)), None)


def shape_of(batch: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of a batch; that of a nested one as of one packed sequence: (1, positions, ...)."""
    if not batch.is_nested:
        return tuple(batch.shape)
    if batch.layout is torch.jagged:  # its lengths are on the device, where nobody may ask for them
        return (1, *batch.values().shape)
    rows = batch.unbind()
    return (1, sum(len(row) for row in rows), *(rows[0].shape[1:] if rows else ()))


def tokens_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Returns the positions in a batch of this shape: what the size of its activations is proportional to.

    All elements of integer tensors (ids) and of tensors of up to two dimensions (waveforms); samples x positions where
    the last of three dimensions holds features; samples alone for images and volumes. Never more than all elements.
    """
    if len(shape) <= 2 or not dtype.is_floating_point:
        return prod(shape)
    return shape[0] * shape[1] if len(shape) == 3 else shape[0]


def count_tokens(batch: torch.Tensor) -> int:
    """Returns the positions in a batch."""
    return tokens_of(shape_of(batch), batch.dtype)

"""The gradients of a step without a trace: how many bytes of them there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil

import torch

from memtrace.attribution.models.held import have_gradients
from memtrace.attribution.storages import storages_of
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category
from memtrace.sources.events import dtype_name

_ASKED = 64


class GradientCount:
    """Counts the bytes of the gradients that some parameters have, by element type.

    A gradient has the shape of its parameter in every step. So they are measured one by one only where another set of
    parameters has one than the time before, and where one is sparse and has another size each time. To ask a parameter
    whether it has one takes about 0.1 us: of more than 64, each count asks 64 others, evenly spread. Where all
    gradients come or go that is seen at once; where a few do, after as many counts as it takes to ask all. None is kept
    alive.

    Args:
        parameters: what returns one each as long as it is there (`Held.reference_to`): those of the model and those
            that its optimizers hold instead, each once.
        device: where the gradients are that count.
    """

    def __init__(self, parameters: Iterable[Callable[[], torch.Tensor | None]], device: torch.device) -> None:
        self._parameters = list(parameters)
        self.device = device
        self._present: list[bool] | None = None
        self._apart = max(1, ceil(len(self._parameters) / _ASKED))
        self._turn = 0
        self._counted: dict[EntryKey, int] = {}
        self._requested: int | None = None
        """What was allocated at the last count."""
        self._to_ask = 0
        """Counts until all have been asked while that much was allocated."""

    def count(self, requested_bytes: int | None = None) -> dict[EntryKey, int]:
        """Returns the bytes of the gradients that exist now.

        Args:
            requested_bytes: what is allocated now, where the allocator counts it: none is asked where all have been
                since as much was allocated.
        """
        if requested_bytes is None or requested_bytes != self._requested:
            self._requested, self._to_ask = requested_bytes, self._apart
        if not self._to_ask:
            return self._counted
        self._to_ask -= 1
        self._turn = (self._turn + 1) % self._apart
        asked = slice(self._turn, None, self._apart)
        if self._present is None or self._present[asked] != have_gradients(self._parameters[asked]):
            found = [None if (parameter := find()) is None else parameter.grad for find in self._parameters]
            gradients = [gradient for gradient in found if gradient is not None]
            strided = all(gradient.layout is torch.strided for gradient in gradients)
            self._present = [gradient is not None for gradient in found] if strided else None
            self._counted, self._to_ask = gradient_bytes(gradients, self.device), 0
        return self._counted


def gradient_bytes(gradients: Iterable[torch.Tensor], device: torch.device) -> dict[EntryKey, int]:
    """Returns the bytes of gradients by element type, each storage once; about 1 us a gradient."""
    totals: dict[torch.dtype, int] = {}
    seen: set[int] = set()
    for gradient in gradients:
        for storage, nbytes, dtype in storages_of(gradient, device):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                totals[dtype] = totals.get(dtype, 0) + nbytes
    return {EntryKey(Category.GRADIENTS, "", dtype_name(dtype)): size for dtype, size in totals.items()}

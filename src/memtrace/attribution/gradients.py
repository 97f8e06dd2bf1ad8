"""The gradients of a step without a trace: how many bytes of them there are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from memtrace.attribution.storages import storages_of
from memtrace.breakdown import EntryKey
from memtrace.categories import Category
from memtrace.sources.events import dtype_name


class GradientCount:
    """Counts the bytes of the gradients that some parameters have, by element type.

    A gradient has the shape of its parameter in every step. So they are looked at one by one only where another set of
    parameters has one than the time before, and where one is sparse and has another size each time: else a count takes
    about 0.1 us a parameter. Parameters are held weakly.

    Args:
        parameters: those of the model and those that its optimizers hold instead, each once.
        device: where the gradients are that count.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], device: torch.device) -> None:
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self.device = device
        self._present: list[bool] | None = None
        self._counted: dict[EntryKey, int] = {}

    def count(self) -> dict[EntryKey, int]:
        """Returns the bytes of the gradients that exist now."""
        present = [(p := alive()) is not None and p.grad is not None for alive in self._parameters]
        if present != self._present:
            gradients = [p.grad for alive in self._parameters if (p := alive()) is not None and p.grad is not None]
            self._present = present if all(gradient.layout is torch.strided for gradient in gradients) else None
            self._counted = gradient_bytes(gradients, self.device)
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

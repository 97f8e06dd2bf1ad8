"""What a module holds: weights and buffers, and the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.storages import dtype_name
from memtrace.breakdown import EntryKey
from memtrace.categories import Category


def claim_model(model: nn.Module, ledger: Ledger) -> None:
    """Claims every parameter and buffer of the module; tied and shared ones count once."""
    for parameter in model.parameters():
        ledger.claim(parameter, Category.WEIGHTS, "trainable" if parameter.requires_grad else "frozen")
    for buffer in model.buffers():
        ledger.claim(buffer, Category.BUFFERS)


def claim_gradients(parameters: Iterable[torch.Tensor], ledger: Ledger) -> None:
    """Claims `.grad` of each parameter that has one."""
    for parameter in parameters:
        if parameter.grad is not None:
            ledger.claim(parameter.grad, Category.GRADIENTS)


def gradient_bytes(parameters: Iterable[torch.Tensor], device: torch.device) -> dict[EntryKey, int]:
    """Returns the bytes of `.grad` over the parameters, by element type, without touching the ledger.

    Counts each gradient as a tensor of its own: for a step that is not traced, about 0.2 us a parameter.
    """
    totals: dict[torch.dtype, int] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.device == device:
            totals[gradient.dtype] = totals.get(gradient.dtype, 0) + gradient.nbytes
    return {EntryKey(Category.GRADIENTS, "", dtype_name(dtype)): size for dtype, size in totals.items()}

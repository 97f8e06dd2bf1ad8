"""What autograd saves for the backward pass: activations, and casts of weights among them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from memtrace.attribution.models.contents import HasParameters
from memtrace.attribution.storages import storages_of
from memtrace.record.categories import Category
from memtrace.sources import torch_private
from memtrace.sources.events import MEMORY, Coordinates, TagEvent, tags_of

_VIEWS = (
    "TBackward",
    "Transpose",
    "Permute",
    "View",
    "UnsafeView",
    "Reshape",
    "Alias",
    "Expand",
    "Unsqueeze",
    "Squeeze",
)
"""Beginnings of the names of gradient functions of views: what may lie between a cast and the tensor that is saved."""
_MAX_VIEWS = 4
_CAST_TO = (torch.bfloat16, torch.float16)

_ACTIVATIONS = tags_of(Category.ACTIVATIONS, "")
_CASTS = tags_of(Category.TRANSIENT_WEIGHTS, "autocast")


class ActivationTags:
    """Notes every tensor that is packed for backward; the replay keeps stronger roles that a storage has.

    A low-precision copy of a parameter that autocast made is a transient weight, not an activation: it does not grow
    with the batch. It is told by its gradient function (views of a cast of a parameter); a copy of a frozen parameter
    has none and is told by its shape: the transposed view of a matrix, or a convolution's kernel.
    """

    def __init__(self, model: HasParameters, device: torch.device, coordinates: Coordinates = MEMORY) -> None:
        self.notes: list[TagEvent] = []
        self._model, self._device = model, device
        self._now_ns, self._address_of = coordinates.now_ns, coordinates.address_of

    def pack(self, tensor: torch.Tensor) -> None:
        """Notes one tensor that autograd saves; costs about 1 us."""
        is_cast = tensor.dtype in _CAST_TO and self._is_cast_weight(tensor)
        tags = _CASTS if is_cast else _ACTIVATIONS
        for storage, nbytes, dtype in storages_of(tensor, self._device):
            try:
                address = self._address_of(storage)
            except RuntimeError:
                if torch_private.is_zero_tensor(tensor) or torch_private.runs_without_memory():
                    return
                raise
            self.notes.append(TagEvent(self._now_ns(), address, nbytes, tags[dtype]))

    def _is_cast_weight(self, tensor: torch.Tensor) -> bool:
        node = tensor.grad_fn
        if node is None:
            return not tensor.requires_grad and self._looks_like_frozen_cast(tensor)
        for _ in range(_MAX_VIEWS):
            if node.name() == "ToCopyBackward0":
                source = node.next_functions[0][0]
                variable = getattr(source, "variable", None)
                return isinstance(variable, nn.Parameter) and variable.dtype is torch.float32
            below = node.next_functions[0][0] if node.next_functions else None
            if below is None or not node.name().startswith(_VIEWS):
                return False
            node = below
        return False

    @cached_property
    def _frozen_shapes(self) -> set[tuple[int, ...]]:
        """The shapes of the frozen parameters in full precision; of matrices, of their transposed views."""
        frozen = [p for p in self._model.parameters() if not p.requires_grad and p.dtype is torch.float32]
        return {tuple(p.shape)[::-1] if p.dim() == 2 else tuple(p.shape) for p in frozen if p.dim() >= 2}

    def _looks_like_frozen_cast(self, tensor: torch.Tensor) -> bool:
        shape = tuple(tensor.shape)
        if len(shape) < 2 or (len(shape) == 2 and tensor.stride() != (1, shape[0])):
            return False
        return shape in self._frozen_shapes

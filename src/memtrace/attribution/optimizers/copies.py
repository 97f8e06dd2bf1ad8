"""What copies of a model's parameters can look like, by which master weights are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch.nn.parameter import is_lazy


class Copies:
    """The parameters as copies of them are compared with: asked for many tensors, looked up once.

    Not those of lazy modules that have no shape yet.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = [parameter for parameter in parameters if not is_lazy(parameter)]

    @cached_property
    def _shapes(self) -> Mapping[int, set[torch.Size]]:
        """The shapes of the parameters by the bytes of an element."""
        shapes: dict[int, set[torch.Size]] = {}
        for parameter in self._parameters:
            if parameter.is_floating_point():
                shapes.setdefault(parameter.element_size(), set()).add(parameter.shape)
        return shapes

    @cached_property
    def _elements(self) -> Mapping[int, int]:
        """The elements of the parameters by the bytes of one."""
        elements: Counter[int] = Counter()
        for parameter in self._parameters:
            if parameter.is_floating_point():
                elements[parameter.element_size()] += parameter.numel()
        return elements

    def may_have(self, tensor: torch.Tensor, *, or_the_same: bool = False) -> bool:
        """Whether the tensor has the shape of a parameter, or is flat over several, and higher precision.

        Args:
            tensor: what an optimizer updates.
            or_the_same: whether the precision may be the parameter's: the optimizer updates nothing else.
        """
        if not tensor.is_floating_point():
            return False
        if or_the_same and tensor.shape in self._shapes.get(tensor.element_size(), ()):
            return True
        lower = [size for size in self._shapes if size < tensor.element_size()]
        if any(tensor.shape in self._shapes[size] for size in lower):
            return True
        flat = tensor.dim() == 1 and bool(lower)
        return flat and tensor.numel() <= sum(self._elements[size] for size in lower) + _FLAT_PADDING


_FLAT_PADDING = 4096
"""Elements by which engines pad a flat master copy for alignment at most."""

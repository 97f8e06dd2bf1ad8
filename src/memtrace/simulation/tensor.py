"""Tensors with a shape, an element type and a storage of some size, but without memory behind it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from memtrace.errors import PlanError
from memtrace.simulation import torch_fake

DEVICE = torch.device("cpu")
"""Where simulated tensors say they are. Autograd of a torch without CUDA refuses tensors that say `cuda`."""

_META = torch.device("meta")


class Layout(NamedTuple):
    """What the result of an operator depends on, of one of its tensors."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class SimulatedTensor(torch.Tensor):
    """A tensor without memory. Its storage has a size and an identity: views of one tensor share it.

    Operators on it work inside a `Simulation` only.
    """

    __torch_function__ = torch_fake.no_torch_function
    device = DEVICE  # asked far too often to go through C++ and back

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # typed as an instance method there
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        if func is torch_fake.DEVICE_OF:
            return DEVICE
        raise PlanError(f"{func} was called on a simulated tensor outside of its simulation: keep plans self-contained")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Returns known values; torch itself leaves this out for tensors that are dispatched in Python."""
        return self.item() if self.dim() == 0 else [part.tolist() for part in self.unbind()]


class SimulatedStorage(torch.UntypedStorage):
    """A storage of some size without memory, which tells where it is resized: no operator does."""

    resized: weakref.WeakMethod[Resized]

    def resize_(self, nbytes: int) -> None:
        """Changes the size, in bytes."""
        super().resize_(nbytes)
        resized = self.resized()
        if resized is not None:
            resized(self)


Resized = Callable[[SimulatedStorage], None]


def layout_of(tensor: torch.Tensor) -> Layout:
    """Returns shape, strides and element type of a tensor."""
    return Layout(tensor.shape, tensor.stride(), tensor.dtype)


def begin_of(tensor: torch.Tensor) -> int:
    """Returns where a tensor begins on its storage, in elements."""
    return int(tensor.storage_offset())


def new_tensor(layout: Layout, nbytes: int, resized: Resized, offset: int = 0) -> SimulatedTensor:
    """Returns a tensor on a new storage of `nbytes` bytes, which tells `resized`; `offset` counts elements."""
    storage = SimulatedStorage(nbytes, device=_META)  # type: ignore[no-untyped-call]
    storage.resized = weakref.WeakMethod(resized)
    return tensor_on(storage, layout, offset)


def tensor_on(storage: torch.UntypedStorage, layout: Layout, offset: int) -> SimulatedTensor:
    """Returns a tensor on an existing storage; `offset` counts elements from the beginning of the storage."""
    tensor = torch.empty(0, dtype=layout.dtype, device=_META)
    tensor.set_(storage, offset, layout.shape, layout.stride)
    return torch_fake.as_subclass(SimulatedTensor, tensor, DEVICE)

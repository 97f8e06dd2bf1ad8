"""The private torch calls that tensors without memory need.

Apart from `torch_private`, because torch's fake kernels take half a second to load and a live tracer never needs them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

TensorType = TypeVar("TensorType", bound=torch.Tensor)

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
"""What a fake kernel raises where its result depends on values; both are RuntimeErrors."""

UNSUPPORTED = (UnsupportedOperatorException, NotImplementedError)
"""What is raised for an operator that has no fake kernel."""

DEVICE_OF = torch.ops.prim.device.default
"""How C++ asks a Python tensor for its device."""

no_torch_function: Callable[..., Any] = torch._C._disabled_torch_function_impl
"""`__torch_function__` of a tensor class that leaves Python calls as they are."""


_MISTAKES_OWNERS = TorchVersion(torch.__version__) < TorchVersion("2.10")


def operators(*names: str) -> frozenset[torch._ops.OpOverload]:
    """Returns those of these operators of `aten` that this version of torch has, each in its default form."""
    known = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(packet.default for packet in known if packet is not None)


def as_subclass(cls: type[TensorType], tensor: torch.Tensor, device: torch.device) -> TensorType:
    """Returns a tensor of class `cls` on the storage of `tensor` that says it is on `device` and dispatches there."""
    return torch.Tensor._make_subclass(cls, tensor, False, dispatch_device=True, device_for_backend_keys=device)


def without_dispatch() -> AbstractContextManager[object]:
    """Returns a context in which no Python dispatch happens: operators reach torch's own kernels."""
    return cast("AbstractContextManager[object]", torch._C._DisableTorchDispatch())


def without_function_modes() -> AbstractContextManager[object]:
    """Returns a context in which no function mode hears of calls, above all not of what a dispatch asks tensors for."""
    return cast("AbstractContextManager[object]", torch._C.DisableTorchFunction())


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a DTensor; `to_local()` makes a view of it."""
    shard: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return shard


def is_engine_sum(gradient: torch.Tensor) -> bool:
    """Returns whether autograd adds to this gradient because a tensor was used twice, and holds it alone.

    Called with the first operand of an addition, inside its dispatch. Then real tensors are added in place
    (`can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp), which torch leaves out for every tensor that is
    dispatched in Python. Its own reference shows in the counts: one each for the engine's buffer, the arguments of the
    dispatch in C++ and in Python, and the tensor's Python object.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    storage = gradient.untyped_storage()
    dense = gradient.numel() * gradient.element_size() == storage.nbytes()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2
    return dense and alone and gradient._use_count() == 4  # type: ignore[attr-defined]


def collect_storages() -> None:
    """Frees the reference cycles of a simulation that is over, where torch must not meet them later.

    Before 2.10 the owner of a storage, Python or C++, can be mistaken when the cycle collector meets the storages of
    one simulation in the middle of the next: torch refuses a storage of its own, or reads memory that was freed.
    """
    if _MISTAKES_OWNERS:
        gc.collect()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of a fake kernel that refuses its arguments: the error tells it all."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def fake_mode_is_on() -> bool:
    """Returns whether somebody (such as DTensor, to learn a shape) runs fake kernels below the current mode."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def fake_kernels() -> FakeTensorMode:
    """Returns a mode in which operators compute shapes, strides and element types, and nothing else.

    Without torch's own cache, which is one for the process and does not know that two results are one tensor: the
    second plan of an LSTM would be another than the first.
    """
    mode = FakeTensorMode()
    mode.cache_enabled = False
    return mode


__all__ = [
    "DATA_DEPENDENT",
    "DEVICE_OF",
    "UNSUPPORTED",
    "DispatchMode",
    "FakeTensorMode",
    "as_subclass",
    "fake_kernels",
    "fake_mode_is_on",
    "is_engine_sum",
    "no_torch_function",
    "operators",
    "quiet",
    "shard_of",
    "without_dispatch",
    "without_function_modes",
]

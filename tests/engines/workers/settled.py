"""Gloo whose buffers are given back on the thread that asked for the collective.

The events of the CPU allocator belong to the thread that allocates or frees. Gloo runs collectives on threads of its
own, and drops its references to their tensors an instant after the caller's wait has returned: now and then its
reference is the last one, and nobody sees the free. Here each collective returns when gloo has let go of its tensors.
On a GPU the allocator's history sees all threads, and none of this matters.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce")


class _DoneWork:
    """The work of an asynchronous collective that is over."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def init_settled_gloo() -> None:
    """Initialises torch.distributed with gloo from the launcher's environment, and replaces its collectives."""
    dist.init_process_group("gloo")
    for name in _COLLECTIVES:
        setattr(dist, name, _settled(getattr(dist, name)))
    dist.reduce_scatter_tensor = _reduce_scatter_tensor


def _settled(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        tensors = list(_tensors((args, kwargs)))
        before = [_references(tensor) for tensor in tensors]
        collective(*args, **kwargs)
        while any(_references(tensor) > count for tensor, count in zip(tensors, before, strict=True)):
            os.sched_yield()
        return _DoneWork() if async_op else None

    return call


def _reduce_scatter_tensor(
    output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Does what gloo does for this collective: reduces a copy of everything, of which each rank keeps its part."""
    everything = input.clone()
    dist.all_reduce(everything, op, group)
    output.copy_(everything.chunk(dist.get_world_size(group))[dist.get_rank(group)].view_as(output))
    return _DoneWork() if async_op else None


def _references(tensor: torch.Tensor) -> int:
    """How many hold the tensor, or a view of its storage."""
    return tensor._use_count() + torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))

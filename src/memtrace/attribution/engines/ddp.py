"""DistributedDataParallel: the buckets of the reducer.

Run with torch 2.13. The reducer is C++ and lets no Python object refer to its buckets; it tells their sizes in what it
logs about itself. With `gradient_as_bucket_view` each `.grad` is a view of its bucket, which is then a gradient and
nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.hidden import HiddenBuffers
from memtrace.record.categories import Category
from memtrace.record.limitations import unread_engine
from memtrace.sources import engines_torch_private
from memtrace.sources.events import Tag, dtype_name


def find(model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module]) -> Engine | None:
    """Returns the engine where the model is wrapped in DistributedDataParallel.

    The wrapper is the model itself, or it is running the model's forward pass now: a model does not know its wrapper.
    """
    library = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(library, "DistributedDataParallel", None)
    if wrapper is None:
        return None
    if isinstance(model, wrapper):
        return DdpEngine(model)
    running = engines_torch_private.running_ddp()
    if running is not None and any(module is model for module in running.modules()):
        return DdpEngine(running)
    return None


class DdpEngine(Engine):
    """DistributedDataParallel.

    Args:
        wrapper: the DistributedDataParallel module.
    """

    name = "DDP"
    leaves_gradients = True

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        if not engines_torch_private.shows_ddp_buckets(wrapper):
            self.limitation = unread_engine(self.name, "its buckets", torch.__version__)
        self._views = bool(wrapper.gradient_as_bucket_view)
        self._rebuilt: HiddenBuffers | None = None
        """The buckets of now, once the reducer has rebuilt them: it does so once, and to ask it takes long."""

    def hidden_buffers(self) -> HiddenBuffers | None:
        """Returns the buckets, unless gradients are views of them."""
        return None if self._views else self._buckets()

    def gradient_buffers(self) -> HiddenBuffers | None:
        """Returns the buckets where gradients are views of them."""
        return self._buckets() if self._views else None

    def _buckets(self) -> HiddenBuffers:
        """Returns the buckets of the gradients: those the reducer began with, and those it rebuilt in step 2."""
        if self._rebuilt is not None:
            return self._rebuilt
        first, rebuilt = engines_torch_private.ddp_bucket_bytes(self._wrapper)
        types = {p.dtype for p in self._wrapper.parameters() if p.requires_grad}
        dtype = dtype_name(types.pop()) if len(types) == 1 else ""
        tag = Tag(Category.GRADIENTS, "", dtype) if self._views else Tag(Category.COMM_BUFFERS, "bucket", dtype)
        hidden = HiddenBuffers(tag=tag, first=first, current=rebuilt or None)
        self._rebuilt = hidden if rebuilt else None
        return hidden

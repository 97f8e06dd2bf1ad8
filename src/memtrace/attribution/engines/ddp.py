"""DistributedDataParallel: the buckets of the reducers.

Run with torch 2.13. A reducer is C++ and lets no Python object refer to its buckets; it tells their sizes in what it
logs about itself. Each wrapper has one: a generator and a discriminator have two. With `gradient_as_bucket_view` each
`.grad` is a view of its bucket, which is then a gradient and nothing else. A communication hook's state is Python's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.hidden import HiddenBuffers
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.storages import state_tensors
from memtrace.record.categories import Category
from memtrace.record.limitations import unread_engine
from memtrace.sources import engines_torch_private
from memtrace.sources.events import Tag, dtype_name


def find(model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module]) -> Engine | None:
    """Returns the engine where the model, or parts of it, are wrapped in DistributedDataParallel.

    The wrappers are among the modules, or one runs the model's forward pass now: a model does not know its wrapper.
    """
    library = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(library, "DistributedDataParallel", None)
    if wrapper is None:
        return None
    wrappers = [module for module in modules if isinstance(module, wrapper)]
    if not wrappers:
        running = engines_torch_private.running_ddp()
        if running is not None and any(module is model for module in running.modules()):
            wrappers = [running]
    return DdpEngine(wrappers) if wrappers else None


class DdpEngine(Engine):
    """DistributedDataParallel.

    Args:
        wrappers: the DistributedDataParallel modules.
    """

    name = "DDP"
    leaves_gradients = True

    def __init__(self, wrappers: Sequence[Any]) -> None:
        self._reducers = [_Reducer(wrapper) for wrapper in wrappers]
        if not all(map(engines_torch_private.shows_ddp_buckets, wrappers)):
            self.limitation = unread_engine(self.name, "its buckets", torch.__version__)

    def claim(self, ledger: Ledger) -> None:
        """Claims what the communication hooks keep: what PowerSGD's has lost of each gradient, and its factors."""
        for reducer in self._reducers:
            kept = state_tensors(engines_torch_private.kept_by_ddp_hooks(reducer.wrapper))
            ledger.claim_all((tensor for _, tensor in kept), Category.COMM_BUFFERS, "hook")

    def hidden_buffers(self) -> Sequence[HiddenBuffers]:
        """Returns the buckets of each wrapper, unless gradients are views of them."""
        return [reducer.buckets() for reducer in self._reducers if not reducer.views]

    def gradient_buffers(self) -> Sequence[tuple[HiddenBuffers, nn.Module]]:
        """Returns the buckets of each wrapper whose gradients are views of them."""
        return [(reducer.buckets(), reducer.wrapper) for reducer in self._reducers if reducer.views]


class _Reducer:
    """The reducer of one wrapper."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.views = bool(wrapper.gradient_as_bucket_view)
        self._rebuilt: HiddenBuffers | None = None
        """The buckets of now, once the reducer has rebuilt them: it does so once, and to ask it takes long."""

    def buckets(self) -> HiddenBuffers:
        """Returns the buckets of the gradients: those the reducer began with, and those it rebuilt in step 2."""
        if self._rebuilt is not None:
            return self._rebuilt
        first, rebuilt = engines_torch_private.ddp_bucket_bytes(self.wrapper)
        types = {p.dtype for p in self.wrapper.parameters() if p.requires_grad}
        dtype = dtype_name(types.pop()) if len(types) == 1 else ""
        tag = Tag(Category.GRADIENTS, "", dtype) if self.views else Tag(Category.COMM_BUFFERS, "bucket", dtype)
        settled = not engines_torch_private.rebuilds_ddp_buckets(self.wrapper)
        hidden = HiddenBuffers(tag=tag, first=first, current=rebuilt or None, settled=settled)
        self._rebuilt = hidden if rebuilt else None
        return hidden

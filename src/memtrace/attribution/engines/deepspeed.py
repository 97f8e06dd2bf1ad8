"""DeepSpeed: flat weights, fp32 partitions, gradient partitions and buckets of ZeRO 0 to 3.

Read with DeepSpeed 0.19. Its optimizers (`DeepSpeedZeroOptimizer` for ZeRO 1 and 2, `..._Stage3`, `BF16_Optimizer`,
`FP16_Optimizer` and `FP16_UnfusedOptimizer` for ZeRO 0) wrap the torch optimizer that steps, put flat fp32 copies into
its parameter groups, and keep everything else as attributes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import Role
from memtrace.attribution.optimizers.finding import wrapping_chain
from memtrace.record.categories import Category

_HELD: tuple[tuple[str, Role], ...] = (
    ("bit16_groups_flat", Role(Category.WEIGHTS, "trainable")),  # ZeRO 1 and 2
    ("bf16_groups_flat", Role(Category.WEIGHTS, "trainable")),  # ZeRO 1 with fp32 gradient accumulation
    ("fp16_groups_flat", Role(Category.WEIGHTS, "trainable")),  # ZeRO 0 with a fused optimizer
    ("lp_param_buffer", Role(Category.WEIGHTS, "trainable")),  # ZeRO 3
    ("fp16_partitioned_groups_flat", Role(Category.WEIGHTS, "trainable")),
    ("single_partition_of_fp32_groups", Role(Category.MASTER_WEIGHTS)),  # ZeRO 1 and 2
    ("fp32_partitioned_groups_flat", Role(Category.MASTER_WEIGHTS)),  # ZeRO 3
    ("fp32_groups_flat_partition", Role(Category.MASTER_WEIGHTS)),  # ZeRO 1 with fp32 gradient accumulation
    ("fp32_groups_flat", Role(Category.MASTER_WEIGHTS)),  # ZeRO 0 with a fused optimizer
    ("fp32_groups", Role(Category.MASTER_WEIGHTS)),  # ZeRO 0
    ("param_buffer_of_bit16_for_cpu_offload_groups", Role(Category.COMM_BUFFERS, "offload")),
    ("temp_grad_buffer_for_cpu_offload", Role(Category.COMM_BUFFERS, "offload")),
    ("temp_grad_buffer_for_gpu_offload", Role(Category.COMM_BUFFERS, "offload")),
    ("inf_or_nan_tracker", Role(Category.BUFFERS, "overflow")),
    ("_global_grad_norm", Role(Category.BUFFERS, "grad_norm")),
)
"""Attributes of DeepSpeed's optimizers that hold tensors, however nested, between steps."""

_GRADIENTS = (
    "averaged_gradients",  # ZeRO 1 to 3: the reduced partition of this rank
    "all_grad_tensors",
    "grads_in_partition",  # ZeRO 2
    "grad_partitions_flat_buffer",  # ZeRO 3
    "fp32_groups_gradients_flat",  # ZeRO 1 with fp32 gradient accumulation
    "accumulated_grads_in_cpu",  # offload
)


def find(model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module]) -> Engine | None:
    """Returns the engine behind DeepSpeed's own optimizer; None where there is none."""
    library = sys.modules.get("deepspeed.runtime.base_optimizer")
    base = getattr(library, "DeepSpeedOptimizer", None)
    if base is None:
        return None
    candidates = [*optimizers, getattr(model, "optimizer", None)]
    for candidate in candidates:
        for optimizer in wrapping_chain(candidate):
            if isinstance(optimizer, base):
                return DeepSpeedEngine(optimizer, model, modules)
    return None


class DeepSpeedEngine(Engine):
    """ZeRO 0 to 3.

    Args:
        optimizer: DeepSpeed's optimizer, which wraps the one that steps.
        model: the module that is trained, as the user or DeepSpeed wrapped it.
        modules: it and all modules in it.
    """

    prepares_gradients = True

    def __init__(self, optimizer: Any, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._optimizer = optimizer
        self._model = model
        self._shards_weights = hasattr(optimizer, "fp16_partitioned_groups_flat")
        self.shards = self._shards_weights or hasattr(optimizer, "single_partition_of_fp32_groups")
        self._gathered: dict[int, nn.Parameter] = {}
        """Parameters by the address at which they were gathered last."""
        registries = (getattr(module, "ds_inflight_param_registry", None) for module in modules)
        self._in_progress = [registry for registry in registries if registry is not None]
        """All-gathers that were begun for modules to come, with their flat outputs."""
        self.name = "DeepSpeed ZeRO-3" if self._shards_weights else "DeepSpeed"

    def claim(self, ledger: Ledger) -> None:
        """Claims flat weights, fp32 masters, gradient partitions and whatever buckets exist."""
        for attribute, role in _HELD:
            _claim(getattr(self._optimizer, attribute, None), role, ledger)
        if self._shards_weights:
            for parameter in self._model.parameters():
                shard = getattr(parameter, "ds_tensor", None)
                _claim(shard, Role(Category.WEIGHTS, "trainable" if parameter.requires_grad else "frozen"), ledger)
        _claim(list(self.gradients()), Role(Category.GRADIENTS), ledger)
        self.claim_passing(ledger)

    def claim_passing(self, ledger: Ledger) -> None:
        """Claims the buckets of the reduction, which are made anew in each backward pass, and ZeRO-2's partition."""
        for bucket in getattr(self._optimizer, "ipg_buckets", {}).values():
            _claim(bucket.buffer, Role(Category.COMM_BUFFERS, "reduce"), ledger)
        _claim(getattr(self._optimizer, "grads_in_partition", None), Role(Category.GRADIENTS), ledger)

    def gradients(self) -> Iterable[torch.Tensor]:
        """Returns the partitions of the reduced gradients, and what the masters have: ZeRO-3 takes a sub-group out of
        the inner optimizer when it has stepped, and offloaded it keeps its float32 gradient."""
        for attribute in _GRADIENTS:
            yield from _tensors(getattr(self._optimizer, attribute, None))
        for attribute, role in _HELD:
            if role.category is Category.MASTER_WEIGHTS:
                masters = _tensors(getattr(self._optimizer, attribute, None))
                yield from (master.grad for master in masters if master.grad is not None)

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns what the full copy of a sharded parameter is: small ones are kept from step to step."""
        if not hasattr(parameter, "ds_tensor"):
            return None
        if getattr(parameter, "ds_persist", False):
            return Role(Category.WEIGHTS, "gathered")
        return Role(Category.TRANSIENT_WEIGHTS, "all_gather")

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether this is the torch optimizer that DeepSpeed steps."""
        return optimizer in wrapping_chain(self._optimizer)

    def updates_per_step(self, optimizer: torch.optim.Optimizer) -> int:
        """Returns the number of parts that ZeRO updates one after the other: parameter groups, or sub-groups."""
        if self._shards_weights:
            return len(self._optimizer.fp16_partitioned_groups_flat)
        return len(getattr(self._optimizer, "single_partition_of_fp32_groups", ())) or 1

    def claim_gathered(self, module: nn.Module, ledger: Ledger) -> None:
        """Claims the full weights of a module."""
        for parameter in module.parameters(recurse=False):
            role = self.role_of(parameter)
            if role is not None and parameter.numel() == getattr(parameter, "ds_numel", None):
                ledger.claim(parameter, role.category, role.component)
                self._gathered[parameter.data_ptr()] = parameter
        for registry in self._in_progress:
            for handle in registry.values():
                for gather in getattr(handle, "handles", (handle,)):
                    _claim(getattr(gather, "partitions", None), Role(Category.COMM_BUFFERS, "all_gather"), ledger)

    def saved_as(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the parameter where its gathered weights are saved: ZeRO-3 frees them after each module."""
        parameter = self._gathered.get(tensor.data_ptr()) if self._shards_weights else None
        if parameter is None or parameter.data_ptr() != tensor.data_ptr():
            return None
        return parameter if (parameter.shape, parameter.stride()) == (tensor.shape, tensor.stride()) else None

    def gathering_modules(self) -> Iterator[nn.Module]:
        """Yields each module that has parameters of its own, where ZeRO-3 gathers them for its forward pass."""
        if self._shards_weights:
            for module in self._model.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    yield module


def _claim(held: Any, role: Role, ledger: Ledger) -> None:
    for tensor in _tensors(held):
        ledger.claim(tensor, role.category, role.component)


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested lists and mappings."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for item in held.values():
            yield from _tensors(item)
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from _tensors(item)

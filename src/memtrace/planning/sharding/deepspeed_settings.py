"""Sharding as a configuration file of DeepSpeed asks for it, with the values that Trainer and Accelerate fill in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memtrace.errors import PlanError
from memtrace.planning.sharding.shares import (
    ZERO_REDUCE_BUCKET,
    ZERO_STAGES,
    Offload,
    Sharding,
    Strategy,
    Zero3Settings,
)

_AUTO = "auto"
_MAX_ELEMENTS = 2**63

_NOT_PLANNED: Mapping[str, object] = {
    "contiguous_gradients": True,
    "parameter_alignment": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "stage3_allgather_sequential": False,
    "stage3_use_all_reduce_for_fetch_params": False,
    "stage3_module_granularity_threshold": 0,
}
"""Settings that change bytes in ways that are not modelled, with the only values that are."""


def read_deepspeed(path: str, world_size: int, hidden_size: int | None) -> Sharding:
    """Returns what `zero_optimization` and `optimizer.params.torch_adam` of a configuration file mean for rank 0.

    Args:
        path: the JSON file that is given to `deepspeed.initialize`, or as `TrainingArguments(deepspeed=...)`.
        world_size: ranks.
        hidden_size: width of the model; sizes that are `auto` follow from it, as in
            transformers/integrations/deepspeed.py. None where it is not known.

    Raises:
        PlanError: the file cannot be read, or asks for what is not modelled; the message names the setting.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"the DeepSpeed configuration {path} cannot be read: {error}") from error
    zero = document.get("zero_optimization", {}) if isinstance(document, dict) else None
    if not isinstance(zero, dict):
        raise PlanError(f"{path}: zero_optimization must be an object, got {zero!r}")
    types = document.get("data_types", {})
    if isinstance(types, dict) and types.get("grad_accum_dtype") not in (None, _AUTO):
        raise PlanError(f"{path}: data_types.grad_accum_dtype is not simulated: leave it out")
    return replace(_Section(path, zero, hidden_size).sharding(world_size), torch_adam=_torch_adam(path, document))


def _torch_adam(path: str, document: Mapping[str, Any]) -> bool:
    """Returns whether the section `optimizer` asks for torch's Adam; there is none where the script makes its own."""
    optimizer = document.get("optimizer") or {}
    parameters = (optimizer.get("params") or {}) if isinstance(optimizer, dict) else None
    value = parameters.get("torch_adam", False) if isinstance(parameters, dict) else parameters
    if not isinstance(value, bool):
        raise PlanError(f"{path}: optimizer.params.torch_adam must be true or false, got {value!r}")
    return value


class _Section:
    """The section `zero_optimization`; every error names file and setting."""

    def __init__(self, path: str, values: Mapping[str, Any], hidden_size: int | None) -> None:
        self._path, self._values, self._hidden_size = path, values, hidden_size

    def sharding(self, world_size: int) -> Sharding:
        for name, modelled in _NOT_PLANNED.items():
            if self._values.get(name, modelled) not in (modelled, _AUTO):
                raise self._error(name, f"only {json.dumps(modelled)} is simulated")
        stage = self._integer("stage", 0)
        if stage not in range(len(ZERO_STAGES)):
            raise self._error("stage", "must be 0..3")
        strategy, default, width = ZERO_STAGES[stage], Zero3Settings(), self._hidden_size
        square = None if width is None else width * width
        return Sharding(
            strategy=strategy,
            world_size=world_size,
            offload=self._offload(),
            overlap_comm=strategy is not Strategy.ZERO3 and self._flag("overlap_comm"),
            reduce_bucket=self._integer("reduce_bucket_size", ZERO_REDUCE_BUCKET, auto=square),
            zero3=Zero3Settings(
                prefetch_bucket=self._integer(
                    "stage3_prefetch_bucket_size",
                    default.prefetch_bucket,
                    auto=None if square is None else int(0.9 * square),
                ),
                max_live=self._integer("stage3_max_live_parameters", default.max_live),
                max_reuse=self._integer("stage3_max_reuse_distance", default.max_reuse),
                persistence_threshold=self._integer(
                    "stage3_param_persistence_threshold",
                    default.persistence_threshold,
                    auto=None if width is None else 10 * width,
                ),
                sub_group=self._integer("sub_group_size", default.sub_group),
            ),
        )

    def _integer(self, name: str, default: int, *, auto: int | None = None) -> int:
        value = self._values.get(name, default)
        if value == _AUTO:
            if auto is None:
                raise self._error(name, "auto needs a model with a hidden_size")
            return auto
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < _MAX_ELEMENTS or value != int(value):
            raise self._error(name, "must be a whole number")
        return int(value)

    def _flag(self, name: str) -> bool:
        value = self._values.get(name)
        if value not in (None, _AUTO, True, False):
            raise self._error(name, "must be true or false")
        return value is True

    def _offload(self) -> Offload:
        if self._device("offload_param") != "none":
            return Offload.PARAMETERS
        return Offload.OPTIMIZER if self._device("offload_optimizer") != "none" else Offload.NONE

    def _device(self, name: str) -> str:
        value = self._values.get(name)
        if value is None:
            return "none"
        device = value.get("device", "none") if isinstance(value, dict) else None
        if not isinstance(device, str):
            raise self._error(name, "must be an object with a device")
        return device

    def _error(self, name: str, expected: str) -> PlanError:
        return PlanError(f"{self._path}: zero_optimization.{name}: {expected}, got {self._values.get(name)!r}")

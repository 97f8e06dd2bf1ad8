"""Where the kernels of a device do other than torch's fake kernels say.

The fake kernels describe what compiled code may rely on. For eager code they are right but for the cases here. What a
kernel takes and gives back inside is not described at all: on a CPU it is scratch for each thread (oneDNN's packed
operands for bfloat16 products are the largest part), and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

import torch

from memtrace.sources.results import NewTensor, Operator, Result, Several
from memtrace.sources.simulated_tensor import Layout

aten = torch.ops.aten


class Target(StrEnum):
    """The kind of device whose kernels are simulated."""

    CPU = "cpu"
    CUDA = "cuda"


_NORMALISATIONS = frozenset(
    {aten.native_layer_norm.default, aten.native_group_norm.default, aten.native_batch_norm.default}
)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BFLOAT16_ONLY = frozenset({aten._grouped_mm.default})
"""Operators whose fake kernels refuse element types that the real ones take."""


def asked_layouts(operator: Operator, inputs: Sequence[Layout]) -> Sequence[Layout]:
    """Returns the layouts to ask a fake kernel with."""
    if operator not in _BFLOAT16_ONLY:
        return inputs
    return [layout._replace(dtype=torch.bfloat16) if layout.dtype.is_floating_point else layout for layout in inputs]


def corrected(target: Target, operator: Operator, inputs: Sequence[Layout], result: Result) -> Result:
    """Returns the result of a fake kernel as the kernels of the target give it."""
    if operator in _BFLOAT16_ONLY:
        return _as_type(result, inputs[0].dtype)
    if operator in _NORMALISATIONS and isinstance(result, Several) and _float32_statistics(target, inputs):
        output, *statistics = result.items
        return Several(result.kind, (output, *(_as_type(item, torch.float32) for item in statistics)))
    return result


def _float32_statistics(target: Target, inputs: Sequence[Layout]) -> bool:
    """Whether mean and deviation are kept in float32: always on CUDA, with float32 weights on a CPU.

    Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu and Normalization.cuh (`acc_type`), and
    native/cpu/mixed_data_type.h.
    """
    if inputs[0].dtype not in _LOW_PRECISION:
        return False
    return target is Target.CUDA or any(layout.dtype is torch.float32 for layout in inputs[1:])


def _as_type(result: Result, dtype: torch.dtype) -> Result:
    """Returns a new tensor with another element type; anything else as it is."""
    if not isinstance(result, NewTensor):
        return result
    nbytes = result.nbytes // result.layout.dtype.itemsize * dtype.itemsize
    return replace(result, layout=result.layout._replace(dtype=dtype), nbytes=nbytes)

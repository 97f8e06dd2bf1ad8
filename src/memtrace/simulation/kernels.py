"""Where the kernels of a device do other than torch's fake kernels say.

The fake kernels describe what compiled code may rely on. For eager code they are right but for the cases here. What a
kernel takes and gives back inside is not described at all. On CUDA the backward pass of attention takes the most, and
is counted here. On a CPU it is scratch for each thread (oneDNN's packed operands for bfloat16 products and
convolutions are the largest part), and is left out; so are the sorting of indices in the backward pass of embeddings
and the workspaces of convolutions on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

import torch

from memtrace.simulation.results import NewTensor, Operator, Result, Several
from memtrace.simulation.tensor import Layout
from memtrace.simulation.torch_fake import operators

aten = torch.ops.aten


class Target(StrEnum):
    """The kind of device whose kernels are simulated."""

    CPU = "cpu"
    CUDA = "cuda"


FLASH: Operator = aten._scaled_dot_product_flash_attention.default
FUSED_ATTENTION: frozenset[Operator] = frozenset({FLASH, aten._scaled_dot_product_efficient_attention.default})
CONVOLUTIONS: frozenset[Operator] = frozenset({aten.convolution.default})
EMBEDDING_GRADIENTS: frozenset[Operator] = frozenset({aten.embedding_dense_backward.default})
"""Operators whose scratch, or whose choice of a kernel, a plan has to make assumptions about."""

_NORMALISATIONS = frozenset(
    {aten.native_layer_norm.default, aten.native_group_norm.default, aten.native_batch_norm.default}
)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BFLOAT16_ONLY = operators("_grouped_mm")
"""Operators whose fake kernels refuse element types that the real ones take; models call none before torch 2.8."""


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


def scratch_bytes(target: Target, operator: Operator, inputs: Sequence[torch.Tensor]) -> int:
    """Returns what a kernel of the target takes inside, and gives back before it returns."""
    count = _SCRATCH[target].get(operator)
    return 0 if count is None else count(inputs)


def _flash_backward(inputs: Sequence[torch.Tensor]) -> int:
    """The query's gradient in float32, one number a row, and with grouped queries the gradients of repeated keys and
    values.

    Source: `mha_bwd` in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    _, query, key = inputs[:3]
    batch, heads, rows, size = query.shape
    rounded = batch * heads * _round_up(rows, 128)
    sums = rounded * _round_up(size, 32) * 4 + rounded * 4
    if key.shape[1] == heads:
        return sums
    return sums + 2 * batch * heads * key.shape[2] * size * key.dtype.itemsize


def _efficient_backward(inputs: Sequence[torch.Tensor]) -> int:
    """One number a row in float32.

    Source: `_efficient_attention_backward` in aten/src/ATen/native/transformers/cuda/attention_backward.cu.
    """
    batch, heads, rows, _ = inputs[1].shape
    return batch * heads * rows * 4


def _safe_softmax(inputs: Sequence[torch.Tensor]) -> int:
    """The softmax before rows without a finite score are replaced, and the comparison that finds those.

    Source: `_safe_softmax` in aten/src/ATen/native/transformers/attention.cpp.
    """
    return inputs[0].numel() * (inputs[0].element_size() + 1)


def _copy_of_output(inputs: Sequence[torch.Tensor]) -> int:
    """Gloo gathers into a flat tensor of its own.

    Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, `_allgather_base` and `newLikeFlat`.
    """
    return inputs[0].numel() * inputs[0].element_size()


def _copy_of_input(inputs: Sequence[torch.Tensor]) -> int:
    """Gloo reduces a copy of its input.

    Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, `_reduce_scatter_base`.
    """
    return inputs[1].numel() * inputs[1].element_size()


_SCRATCH: Mapping[Target, Mapping[Operator, Callable[[Sequence[torch.Tensor]], int]]] = {
    Target.CPU: {
        torch.ops.c10d._allgather_base_.default: _copy_of_output,
        torch.ops.c10d._reduce_scatter_base_.default: _copy_of_input,
    },
    Target.CUDA: {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        aten._safe_softmax.default: _safe_softmax,
    },
}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

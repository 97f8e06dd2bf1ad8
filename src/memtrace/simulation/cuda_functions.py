"""What torch calls on a CUDA device where it calls something else on a CPU.

Simulated tensors say that they are on a CPU, because autograd of a torch without CUDA refuses others. These functions
decide by device before anything is dispatched, so they are answered here as CUDA would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from memtrace.simulation.tensor import DEVICE

aten = torch.ops.aten

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FLASH_HEAD_MULTIPLE = 8
_FLASH_MAX_HEAD = 256
_EFFICIENT_HEAD_MULTIPLE = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
_EFFICIENT_BIAS_MULTIPLE = 16
_FUSED_DIMENSIONS = 4

_BACKWARD = frozenset({torch.Tensor.backward, torch.autograd.backward})
_INPUTS_POSITION = 4
"""Position of the argument `inputs` of both."""

_AUTOCAST_TO_FLOAT32 = frozenset(
    {
        F.layer_norm,
        F.group_norm,
        F.softmax,
        F.log_softmax,
        F.softplus,
        *(getattr(torch, name) for name in ("cumsum", "exp", "log", "pow", "prod", "rsqrt", "softmax", "log_softmax")),
        *(getattr(torch, name) for name in ("sum", "norm", "reciprocal", "cumprod", "cosine_similarity", "cdist")),
        *(getattr(torch.Tensor, name) for name in ("cumsum", "exp", "log", "pow", "prod", "rsqrt", "softmax")),
        *(getattr(torch.Tensor, name) for name in ("log_softmax", "sum", "norm", "reciprocal", "__pow__")),
    }
)
"""Functions that CUDA's autocast runs in float32 and a CPU's runs in the type that it finds.

Source: torch's documentation of automatic mixed precision, "CUDA Ops that can autocast to float32", and "CPU Ops"."""


class BackwardToo(TorchFunctionMode):
    """A mode that is on in the backward pass, too: what is recomputed there must take the way that it took before."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD and not _names_inputs(args, kwargs):
            return self._backward(*args, **kwargs)
        return self.answer(func, args, kwargs)

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns what a function returns while the mode is on."""
        return func(*args, **kwargs)

    def _backward(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        gradient: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: None = None,
        *,
        grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Runs a backward pass with this mode on: what is recomputed in it must take the way that it took before."""
        outputs = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = gradient if grad_tensors is None else grad_tensors
        gradients = [given] * len(outputs) if given is None or isinstance(given, torch.Tensor) else list(given)
        pairs = list(zip(outputs, gradients, strict=True))
        edges = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]
        ones = [torch.ones_like(output) if known is None else known for output, known in pairs]
        with self:  # edges, unlike tensors, do not come here again
            torch.autograd.backward(edges, ones, retain_graph, create_graph, inputs=inputs)


class CudaFunctions(BackwardToo):
    """Answers dropout, attention and autocast's choice of float32 as a CUDA device does."""

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns what a function returns on a CUDA device."""
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled(DEVICE.type):
            args = tuple(_in_float32(value) for value in args)
        return func(*args, **kwargs)


def _names_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return len(args) > _INPUTS_POSITION or kwargs.get("inputs") is not None


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _LOW_PRECISION else value


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:  # as the signature of F.dropout
    """One kernel that saves a mask of booleans; a CPU saves the scaled mask in the type of the input."""
    if not training or p == 0:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(  # noqa: PLR0917 - the signature of F.scaled_dot_product_attention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention where its conditions hold, else memory-efficient attention, else plain products.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp. Where cuDNN's attention is preferred
    to flash attention it saves the same tensors.
    """
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    attn_mask = None if attn_mask is None else _autocast(attn_mask)
    output: torch.Tensor
    if attn_mask is None and _flash_takes(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa):
        size = query.shape[-1]
        padding = -size % _FLASH_HEAD_MULTIPLE
        if padding:
            scale = size**-0.5 if scale is None else scale
            query, key, value = (F.pad(tensor, (0, padding)) for tensor in (query, key, value))
        flash = aten._scaled_dot_product_flash_attention
        output, *_ = flash(query, key, value, dropout_p, is_causal, False, scale=scale)
        return output[..., :size] if padding else output
    if _efficient_takes(query, key, value, attn_mask):
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        saves = any(tensor.requires_grad for tensor in (query, key, value))
        efficient = aten._scaled_dot_product_efficient_attention
        output, *_ = efficient(query, key, value, bias, saves, dropout_p, is_causal, scale=scale)
        return output
    return _plain_products(query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale)


def _flash_takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether flash attention takes these, without a mask: 16 bits, heads of up to 256, square where it is causal."""
    size = query.shape[-1]
    return (
        query.dtype in _LOW_PRECISION
        and _fused_takes(query, key, value)
        and (enable_gqa or query.shape[1] == key.shape[1])
        and size <= _FLASH_MAX_HEAD
        and size == value.shape[-1]
        and not (is_causal and query.shape[-2] != key.shape[-2])
    )


def _efficient_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether memory-efficient attention takes these: no grouped heads, aligned heads, a mask whose rows are dense.

    A learned bias that is a permuted view, as the relative positions of T5, is none of those.
    """
    multiple = _EFFICIENT_HEAD_MULTIPLE.get(query.dtype)
    return (
        multiple is not None
        and _fused_takes(query, key, value)
        and query.shape[1] == key.shape[1]
        and query.shape[-1] % multiple == 0
        and value.shape[-1] % multiple == 0
        and (mask is None or mask.stride(-1) == 1)
    )


def _fused_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """What both fused kernels ask for: four dimensions, one batch, dense vectors."""
    tensors = (query, key, value)
    return (
        all(tensor.dim() == _FUSED_DIMENSIONS and tensor.stride(-1) == 1 for tensor in tensors)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[-1] == key.shape[-1]
    )


def _plain_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """The products written out: scores, softmax and dropout's mask are kept for the backward pass.

    Source: `_scaled_dot_product_attention_math` in aten/src/ATen/native/transformers/attention.cpp. It is repeated here
    for its dropout, which asks for the device before anything is dispatched.
    """
    dtype = query.dtype
    factor = math.sqrt(query.shape[-1] ** -0.5 if scale is None else abs(scale))
    with torch.autocast(DEVICE.type, enabled=False):
        if is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.where(mask, 0.0, torch.full((), float("-inf"), dtype=dtype))
        if dtype in _LOW_PRECISION:
            query, key, value = query.float(), key.float(), value.float()
        query = query * factor
        if query.shape[-3] != key.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        weights = torch.matmul(query, key.transpose(-2, -1) * factor)
        if mask is not None:
            weights = weights.add_(mask)
        weights = aten._safe_softmax(weights, -1)
        if dropout_p > 0:
            weights = torch.native_dropout(weights, dropout_p, True)[0]
        output, _ = torch.matmul(weights, value).to(dtype), weights.to(dtype)
        return output


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as autocast hands it to attention."""
    if torch.is_autocast_enabled(DEVICE.type) and tensor.dtype is torch.float32:
        return tensor.to(torch.get_autocast_dtype(DEVICE.type))
    return tensor


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Returns a mask as a bias of the query's type, its rows padded to 16 elements."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    columns = mask.shape[-1]
    if columns % _EFFICIENT_BIAS_MULTIPLE:
        mask = F.pad(mask, (0, -columns % _EFFICIENT_BIAS_MULTIPLE))[..., :columns]
    return mask.expand(*query.shape[:-1], key.shape[-2])

"""Linear layers with 4-bit weights, as a simulated step needs them: packed bytes, their scales, and nothing else.

bitsandbytes has no kernels for tensors without memory. What it holds and what it allocates is modelled here after
version 0.50: bitsandbytes/nn/modules.py (`Linear4bit`), autograd/_functions.py (`MatMul4Bit`) and functional.py
(`quantize_4bit`, `dequantize_4bit`). NF4 and FP4 take the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

BLOCK = 64
"""Weights that share a scale."""

NESTED_BLOCK = 256
"""Scales that share a scale of their own: double quantization."""

_CODES = 256
"""Values that an 8-bit scale can stand for: a table of float32."""


class Linear4bit(nn.Linear):
    """A frozen linear layer whose weight is held in 4 bits, with double quantization.

    The weight is unpacked for each product, in the forward and again in the backward pass, and dropped after it. All
    that is kept are parameters, so that a simulation finds and claims them as weights.

    Args:
        linear: the layer; its bias is kept.
        compute: type of the product, and of the unpacked weight.
        storage: element type of the packed bytes. Engines that shard weights need a floating-point one
            (`bnb_4bit_quant_storage`).
    """

    def __init__(self, linear: nn.Linear, compute: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute = compute
        device = linear.weight.device
        blocks = -(-self.elements // BLOCK)
        packed = -(-self.elements // (2 * storage.itemsize))

        def kept(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = kept(packed, 1, dtype=storage)
        self.scales = kept(blocks, dtype=torch.uint8)
        self.scales_of_scales = kept(-(-blocks // NESTED_BLOCK), dtype=torch.float32)
        self.scale_codes = kept(_CODES, dtype=torch.float32)
        self.scale_offset = kept(1, dtype=torch.float32)
        self.register_parameter("bias", linear.bias)

    @property
    def elements(self) -> int:
        """Weights, however they are packed."""
        return self.in_features * self.out_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the product in the type of the input.

        The result is a copy, as the adapters of peft make one (tuners/lora/bnb.py, `result.clone()`).
        """
        with torch.autocast(input.device.type, enabled=False):
            result: torch.Tensor = _Product.apply(input.to(self.compute), self)  # type: ignore[no-untyped-call]
        return result.to(input.dtype).clone()

    @property
    def scale_tensors(self) -> tuple[nn.Parameter, ...]:
        """Scales and what they are read with."""
        return self.scales, self.scales_of_scales, self.scale_codes, self.scale_offset

    def unpacked(self) -> torch.Tensor:
        """Returns a copy of the whole weight; its scales are unpacked for it, and dropped."""
        scales = torch.empty(self.scales.numel(), dtype=torch.float32, device=self.scales.device)
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute, device=scales.device)
        del scales
        return weight


class _Product(torch.autograd.Function):
    """Saves nothing: the weight is unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
        ctx.layer = layer
        rows = input.reshape(-1, layer.in_features)
        weight = layer.unpacked().t()
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        result = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return result.view(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.matmul(gradient, ctx.layer.unpacked()), None


def quantize(model: nn.Module, compute: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
    """Puts `Linear4bit` in place of every frozen linear layer but the head, as transformers does on loading.

    Embeddings, norms, the head and weights outside of linear layers (experts in one tensor) stay as they are.
    Adapters around a layer take its input as it is under autocast, as peft's for 4-bit layers do.
    """
    kept = set(_heads(model))
    packed: dict[nn.Module, Linear4bit] = {}
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is not nn.Linear or child in kept or child.weight.requires_grad:
                continue
            if child not in packed:  # one that is shared stays shared
                packed[child] = Linear4bit(child, compute, storage)
            setattr(owner, name, packed[child])
            if hasattr(owner, "cast_input_dtype_enabled"):
                owner.cast_input_dtype_enabled = False  # type: ignore[assignment]


def quantized_layers(model: nn.Module) -> Iterator[Linear4bit]:
    """Yields the layers whose weights are held in 4 bits."""
    return (module for module in model.modules() if isinstance(module, Linear4bit))


def parameter_count(model: nn.Module) -> int:
    """Returns the parameters of a model; those in 4 bits count one by one, without their scales."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    for layer in quantized_layers(model):
        elements += layer.elements - sum(held.numel() for held in (layer.weight, *layer.scale_tensors))
    return elements


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the output layer of a model of transformers, also one that adapters or wrappers are around."""
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", None)
        try:
            found = head() if callable(head) else None
        except (AttributeError, NotImplementedError):  # a part of a model that has none
            continue
        if isinstance(found, nn.Module):
            yield from found.modules()

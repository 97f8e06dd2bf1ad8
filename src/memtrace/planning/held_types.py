"""The element types that a model's parameters have while it is trained, by recipe and engine."""

from __future__ import annotations

import re

import torch
from torch import nn

from memtrace.planning.recipe import Recipe
from memtrace.planning.sharding.shares import Sharding, Strategy
from memtrace.simulation.models.quantized import quantize, quantized_layers


def hold_as(model: nn.Module, recipe: Recipe, sharding: Sharding) -> None:
    """Gives each parameter the type in which the recipe holds it, and packs what the recipe quantizes.

    Modules that a class of transformers keeps in float32 stay so where its weights are loaded in 16 bits. DeepSpeed and
    Apex, which keep master copies, convert them with the rest.
    """
    fsdp = sharding.strategy is Strategy.FSDP
    trained = recipe.updated if fsdp else recipe.weights
    frozen = recipe.loaded if recipe.trains_adapters else trained
    if recipe.quantizes:
        compute = getattr(torch, recipe.compute)
        storage = compute if sharding.shards_weights else torch.uint8
        quantize(model, compute, storage)
    kept = None if recipe.master else _kept_in_float32(model, frozen if recipe.trains_adapters else trained)
    packed = {tensor for layer in quantized_layers(model) for tensor in (layer.weight, *layer.scale_tensors)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter in packed:
            continue
        dtype = getattr(torch, trained if parameter.requires_grad else frozen)
        if kept is not None and kept.search(name):
            dtype = torch.float32
        if parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)


def cast_as_loaded(model: nn.Module, dtype: str) -> None:
    """Gives the floating-point parameters of a model that is not trained the type in which it is loaded."""
    kept = _kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            own = torch.float32 if kept is not None and kept.search(name) else getattr(torch, dtype)
            parameter.data = parameter.data.to(own)


def _kept_in_float32(model: nn.Module, loaded: str) -> re.Pattern[str] | None:
    """Returns what matches the names of modules that loading in this type leaves in float32; None for none.

    Source: transformers, modeling_utils.py, `_keep_in_fp32_modules` (float16 alone) and `_keep_in_fp32_modules_strict`
    (bfloat16, too).
    """
    names: set[str] = set()
    for module in model.modules():
        if loaded == "float16":
            names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
        if loaded in ("float16", "bfloat16"):
            names.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return None
    return re.compile(rf"(^|\.)({'|'.join(re.escape(name) for name in sorted(names))})($|\.)")

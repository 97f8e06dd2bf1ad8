"""Quantised layers: what they keep of a weight in buffers and plain attributes.

GPTQ, AWQ, EETQ and BitNet keep packed integers and their scales in buffers, HQQ keeps the scales in a dictionary beside
a packed parameter, bitsandbytes keeps those of 8-bit layers in the state of the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import nn

from memtrace.attribution.storages import state_tensors

_PACKED = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32}) | {
    dtype for name, dtype in vars(torch).items() if name.startswith(("float8_", "float4_", "uint16", "uint32"))
}
"""Element types of packed weights. Indices of positions are int64, masks bool."""
_SCALES = ("scale", "zero", "absmax", "codebook", "meta", "scb")
"""Parts of the names under which a quantised layer keeps what its integers stand for."""

_OF_ENGINES = ("ds_", "_")
"""How attributes of a parameter begin through which ZeRO-3 refers to its tensors, and to its optimizer."""


def is_packed(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor that a module holds may be a packed weight."""
    return tensor.dtype in _PACKED and tensor.dim() >= 2


def packed_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the buffers of a quantised layer, and the tensors in its plain attributes; of another module nothing.

    A layer is quantised where it holds a packed weight and, under names that say so, scales.

    Args:
        module: a module that holds a tensor of which `is_packed` is true.
    """
    own = dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and _holds(value)}
    if any(sign in name.lower() for name in _names(own, plain) for sign in _SCALES):
        yield from module.buffers(recurse=False)
        yield from (tensor for _, tensor in state_tensors(plain))


def scales_of(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields what a quantised parameter keeps in its attributes, without what ZeRO-3 keeps there: all of its own."""
    own = {name: value for name, value in vars(parameter).items() if not name.startswith(_OF_ENGINES)}
    yield from (tensor for _, tensor in state_tensors(own))


def _holds(value: object) -> bool:
    """Whether an attribute may hold tensors of the layer itself."""
    is_state = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_state or isinstance(value, (torch.Tensor, Mapping, list, tuple))


def _names(own: Mapping[str, object], plain: Mapping[str, object]) -> Iterable[str]:
    yield from own
    for name, value in plain.items():
        yield name
        yield from map(str, value) if isinstance(value, Mapping) else ()
        yield from vars(value) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else ()

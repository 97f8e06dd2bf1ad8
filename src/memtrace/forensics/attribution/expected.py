"""The sizes of a model's parameters and buffers: from its configuration, or from the heads of its checkpoint."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from memtrace.errors import ConfigError, OutputError

INDEX = "model.safetensors.index.json"
_MAX_HEAD = 100 << 20
"""Bytes of the head of a file of safetensors, as its own library bounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedModel:
    """Sizes of what a model is made of, each with how often it occurs."""

    parameters: Mapping[int, int]
    """By number of elements."""
    matrices: Mapping[int, int] = field(default_factory=dict)
    """Of these the ones with two dimensions or more, which autocast casts."""
    buffers: Mapping[int, int] = field(default_factory=dict)
    """By bytes."""

    @property
    def elements(self) -> int:
        """Of all parameters together."""
        return sum(size * count for size, count in self.parameters.items())


def expected_model(source: Path) -> ExpectedModel:
    """Returns the sizes for a `config.json`, a checkpoint's index, a file of safetensors, or a directory with one.

    No weight is read: of a checkpoint only the heads of its files, of a configuration a model without memory is made.

    Raises:
        ConfigError: there is nothing of that kind, or it cannot be understood.
        PlanError: the configuration names no model that can be made.
        OutputError: a file cannot be opened.
    """
    if source.is_dir():
        names = [name for name in ("config.json", INDEX) if (source / name).is_file()]
        found = [source / names[0]] if names else sorted(source.glob("*.safetensors"))
        if not found:
            raise ConfigError(f"{source} has no config.json and no checkpoint of safetensors")
        source = found[0]
        if not names:
            return _of_shapes(shape for file in found for shape in _shapes(file))
    if source.name.endswith(".index.json"):
        return _of_shapes(shape for file in _files_of(source) for shape in _shapes(file))
    return _of_shapes(_shapes(source)) if source.suffix == ".safetensors" else _of_configuration(source)


def sizes_of(parameters: Iterable[tuple[int, ...]], buffers: Iterable[int] = ()) -> ExpectedModel:
    """Returns the sizes of a model from the shapes of its parameters and the bytes of its buffers."""
    elements: dict[int, int] = {}
    matrices: dict[int, int] = {}
    kept: dict[int, int] = {}
    for shape in parameters:
        for counts in (elements, matrices) if len(shape) > 1 else (elements,):
            counts[prod(shape)] = counts.get(prod(shape), 0) + 1
    for nbytes in buffers:
        kept[nbytes] = kept.get(nbytes, 0) + 1
    for counts in (elements, kept):
        counts.pop(0, None)
    return ExpectedModel(parameters=elements, matrices=matrices, buffers=kept)


def _of_shapes(shapes: Iterable[tuple[int, ...]]) -> ExpectedModel:
    return sizes_of(shapes)


def _of_configuration(source: Path) -> ExpectedModel:
    import torch  # noqa: PLC0415 - a checkpoint's sizes need neither

    from memtrace.planning.simulated_run import refusals  # noqa: PLC0415
    from memtrace.simulation.models.builds import ModelSettings, build_model  # noqa: PLC0415
    from memtrace.simulation.models.configurations import load_configuration  # noqa: PLC0415

    configuration = load_configuration(str(source))
    with refusals("the model cannot be made"), torch.device("meta"):
        model = build_model(configuration, ModelSettings())
    return sizes_of(
        (tuple(parameter.shape) for parameter in model.parameters()), (buffer.nbytes for buffer in model.buffers())
    )


def _files_of(index: Path) -> list[Path]:
    names = _object(index, _bytes(index, None)).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{index} must have a 'weight_map' with the file of each weight")
    return [index.parent / Path(name).name for name in sorted(set(names.values()))]


def _shapes(path: Path) -> Iterable[tuple[int, ...]]:
    length = struct.unpack("<Q", _bytes(path, 8).ljust(8, b"\0"))[0]
    if not 0 < length <= _MAX_HEAD:
        raise ConfigError(f"{path} is no file of safetensors: its head would have {length:,} bytes")
    head = _object(path, _bytes(path, 8 + length)[8:])
    for name, described in head.items():
        if name == "__metadata__":
            continue
        shape = described.get("shape") if isinstance(described, dict) else None
        if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
            raise ConfigError(f"{path}: {name} has no shape")
        yield tuple(shape)


def _object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} has no JSON where it should be: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold one JSON object, got {type(found).__name__}")
    return found


def _bytes(path: Path, most: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_HEAD if most is None else most)
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror or error}") from error

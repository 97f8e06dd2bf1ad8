"""Reading the configuration of a transformers model: a file, a directory that has one, or a name on the hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from memtrace.errors import PlanError

MAX_REPEATS = 4096
"""Layers, experts or blocks that are built at most: a model of more is a slip of the pen."""

MAX_LABELS = 2**20
"""Classes of a classifier: transformers makes a name for each."""

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "depths")
"""Fields that give a model its size, by their common names: transformers would take defaults for those left out."""

_MOST = dict.fromkeys(("layer", "expert", "depth", "block", "stage"), MAX_REPEATS) | {"num_labels": MAX_LABELS}
"""What a field may say at most, by a part of its name: beyond that, making the model would take the host's memory."""


def load_configuration(source: str) -> Any:
    """Returns the configuration, an object of transformers.

    Args:
        source: path of a config.json, of a directory that has one, or a name such as `meta-llama/Llama-3.1-8B`.

    Raises:
        PlanError: nothing can be read, the architecture is not known, a field is missing or has no sense; the message
            names the field.
    """
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return configuration_of(_read(path), str(path))
    if path.suffix == ".json" or source.startswith((".", "/", "~")) or path.is_dir():
        raise PlanError(f"{source} is no configuration: expected a config.json or a directory with one")
    return _from_hub(source)


def configuration_of(document: Any, source: str) -> Any:
    """Returns the configuration for the contents of a config.json; `source` is its name for messages.

    Raises:
        PlanError: as `load_configuration`.
    """
    if not isinstance(document, dict):
        raise PlanError(f"{source} must hold one JSON object, got {type(document).__name__}")
    model_type = document.get("model_type")
    if not isinstance(model_type, str):
        raise PlanError(f"{source} has no model_type: it names the architecture, such as llama")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "if it is a model of your own, use memtrace.plan from Python"
        raise PlanError(f"{source}: unknown model_type {model_type!r}: {hint}")
    kind = CONFIG_MAPPING[model_type]
    _check_sizes(document, kind, source)
    _check_repeats(document, source)
    try:
        return kind.from_dict(dict(document))
    except StrictDataclassError as error:
        raise PlanError(f"{source}: {' '.join(str(error).split())}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"{source} is refused by {kind.__name__}: {type(error).__name__}: {error}") from error


def width_of(configuration: Any) -> int | None:
    """Returns the size of a hidden state, by which DeepSpeed sizes some of its buffers; None where nobody says it."""
    text = configuration.get_text_config()
    width = getattr(configuration, "hidden_size", None) or getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}") from error


def _from_hub(name: str) -> Any:
    try:
        configuration = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise PlanError(f"{name!r} is neither a file here nor a configuration that the hub gives: {text}") from error
    return configuration


def _check_sizes(document: Mapping[str, Any], kind: Any, source: str) -> None:
    """Checks that every field which gives the model its size is there, by its common name or by the model's own."""
    for name, part in getattr(kind, "sub_configs", {}).items():
        inner = document.get(name)
        if isinstance(inner, dict):
            _check_sizes(inner, _kind_of(inner) if part is AutoConfig else part, f"{source}, {name}")
    fields = getattr(kind, "__dataclass_fields__", {})
    aliases = getattr(kind, "attribute_map", {})
    for size in _SIZES:
        own = aliases.get(size, size)
        if own in fields and fields[own].default is not None and size not in document and own not in document:
            raise PlanError(f"{source} has no {own}: without it the size of the model is not known; add {own!r}")


def _kind_of(document: Mapping[str, Any]) -> Any:
    """Returns the class for a part that may be any architecture; None where it does not say which."""
    name = document.get("model_type")
    return CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None


def _check_repeats(document: Mapping[str, Any], source: str) -> None:
    """Checks that no count of layers, experts, blocks or labels is beyond reason."""
    for name, value in document.items():
        if isinstance(value, dict):
            _check_repeats(value, f"{source}, {name}")
            continue
        most = next((limit for part, limit in _MOST.items() if part in name), None)
        for count in value if isinstance(value, list) else [value]:
            counted = isinstance(count, (int, float)) and not isinstance(count, bool)
            if most is not None and counted and count > most:
                raise PlanError(f"{source}: {name} must be at most {most}, got {count}")

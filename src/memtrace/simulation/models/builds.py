"""Models and batches of transformers, made from a configuration without weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import transformers
from torch import nn

from memtrace.errors import PlanError
from memtrace.simulation.known_values import MAX_INTEGERS
from memtrace.simulation.models.chunked_loss import ChunkedLoss

_TASKS = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModelForSequenceClassification",
)
"""Where a configuration names no class that computes a loss: the first of these that knows it."""

ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "sdpa"}
"""Names of attention implementations, and what runs for them: flash attention from its own package saves what torch's
own flash attention saves."""

_ONE_LABEL = ("SequenceClassification", "ImageClassification", "AudioClassification")
_CTC_LABELS = 8
_POSITIONS = 2048
"""Tokens of a text where nobody says how many."""
_FIRST_WORD = 3
"""A token that is none of the special ones in common vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What the options of a plan change about a model."""

    attention: str | None = None
    """Name of an attention implementation; None for the model's own choice."""
    gradient_checkpointing: bool = False
    adapter_rank: int | None = None
    """Rank of LoRA adapters on all linear layers but the head; None for no adapters."""
    adapter_targets: tuple[str, ...] | None = None
    """Names of the modules that get adapters, such as `q_proj`; None for all linear layers but the head."""
    chunked_loss: bool = False
    """Whether logits are made for a part of the tokens at a time."""

    def __post_init__(self) -> None:
        if self.attention is not None and self.attention not in ATTENTION:
            raise PlanError(f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}")
        if self.adapter_rank is not None and not 1 <= self.adapter_rank <= 4096:
            raise PlanError(f"the rank of adapters must be 1..4096, got {self.adapter_rank}")
        if self.adapter_targets is not None and not all(self.adapter_targets):
            raise PlanError(
                "the modules that get adapters must be names such as q_proj,v_proj, got an empty one in "
                f"{','.join(self.adapter_targets)!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """Size of one micro batch."""

    samples: int = 1
    positions: int = 2048
    """Tokens of a text, samples of a sound."""
    image_size: int | None = None
    """Height and width of images; None for what the configuration says."""
    padded: bool = False
    """Whether texts are of different lengths, so that a mask says which tokens count."""

    def __post_init__(self) -> None:
        sizes = {"batch size": self.samples, "sequence length": self.positions, "image size": self.image_size}
        for name, value in sizes.items():
            if value is not None and not 1 <= value <= 2**31:
                raise PlanError(f"{name} must be 1..{2**31}, got {value}")


def model_class(configuration: Any) -> Any:
    """Returns the class that trains a configuration: the one that it names, else the first task that knows it.

    Raises:
        PlanError: no class of transformers computes a loss for it.
    """
    for name in configuration.architectures or ():
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        forward = getattr(named, "forward", None)
        if forward is not None and "labels" in inspect.signature(forward).parameters:
            return named
    for task in _TASKS:
        known = getattr(transformers, task)._model_mapping
        if type(configuration) in known:
            found = known[type(configuration)]
            return found[0] if isinstance(found, tuple) else found
    raise PlanError(
        f"transformers has no {configuration.model_type} that computes a loss: use memtrace.plan from Python with loss="
    )


def build_bare(kind: Any, configuration: Any, attention: str | None) -> nn.Module:
    """Returns a model of a class of transformers as training calls it: without a cache of keys and values."""
    configuration.use_cache = False
    if configuration.is_encoder_decoder and getattr(configuration, "decoder_start_token_id", None) is None:
        configuration.decoder_start_token_id = 0
    chosen = {} if attention is None else {"attn_implementation": ATTENTION[attention]}
    model: nn.Module = kind._from_config(configuration, **chosen)
    model.tie_weights()  # type: ignore[operator] # transformers 5.0 leaves that out on the meta device
    return model


def build_model(configuration: Any, settings: ModelSettings) -> nn.Module:
    """Returns the model; call it with the meta device as the default.

    Raises:
        PlanError: adapters were asked for and peft is not there.
    """
    model = build_bare(model_class(configuration), configuration, settings.attention)
    if settings.adapter_rank is not None:
        model = _with_adapters(model, settings.adapter_rank, settings.adapter_targets)
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
        if settings.adapter_rank is not None:
            model.enable_input_require_grads()  # type: ignore[operator]
    return ChunkedLoss(model) if settings.chunked_loss else model


def make_batch(configuration: Any, settings: BatchSettings, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns one micro batch for the model of a configuration, floating-point inputs as `dtype`.

    Raises:
        PlanError: the model needs inputs that nobody can guess, or the text is longer than its positions.
    """
    kind = model_class(configuration)
    return make_inputs(kind, configuration, settings, dtype) | make_labels(kind, configuration, settings)


def make_inputs(kind: Any, configuration: Any, settings: BatchSettings, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the inputs of a class of transformers without labels, floating-point ones as `dtype`.

    Raises:
        PlanError: as `make_batch`.
    """
    samples, positions = settings.samples, settings.positions
    name = kind.main_input_name
    if name == "input_ids":
        _check_positions(configuration, positions)
        inputs = _words(samples, positions, getattr(configuration.get_text_config(), "vocab_size", None))
        if settings.padded:
            return {name: inputs, "attention_mask": _mask(samples, positions)}
    elif name == "pixel_values":
        inputs = torch.empty(_image_shape(configuration, settings), dtype=dtype, device="meta")
    elif name == "input_features" and hasattr(configuration, "max_source_positions"):
        shape = (samples, configuration.num_mel_bins, 2 * configuration.max_source_positions)
        inputs = torch.empty(shape, dtype=dtype, device="meta")
    elif name == "input_values":
        inputs = torch.empty((samples, positions), dtype=dtype, device="meta")
    else:
        raise PlanError(f"{kind.__name__} takes {name}, whose size is not known: use memtrace.plan from Python")
    return {name: inputs}


def make_labels(kind: Any, configuration: Any, settings: BatchSettings) -> dict[str, torch.Tensor]:
    """Returns what a class of transformers computes its loss against."""
    task = kind.__name__
    samples, positions = settings.samples, settings.positions
    if task.endswith(_ONE_LABEL):
        return {"labels": _integers(0, samples)}
    if task.endswith("QuestionAnswering"):
        return {name: _integers(0, samples) for name in ("start_positions", "end_positions")}
    if task.endswith("TokenClassification"):
        return {"labels": _integers(0, samples, positions)}
    if task.endswith("ForCTC"):
        return {"labels": _integers(1, samples, _CTC_LABELS)}
    text = configuration.get_text_config(decoder=True)
    longest = getattr(text, "max_target_positions", None) or positions
    return {"labels": _words(samples, min(positions, longest), getattr(text, "vocab_size", None))}


def _words(samples: int, positions: int, vocabulary: int | None) -> torch.Tensor:
    word = _FIRST_WORD if vocabulary is None or vocabulary > _FIRST_WORD else 0
    return _integers(word, samples, positions)


def _mask(samples: int, positions: int) -> torch.Tensor:
    """Returns ones, with one token of padding in the first text: how many there are changes nothing.

    Raises:
        PlanError: it is too large for its values to be known.
    """
    if samples * positions > MAX_INTEGERS:
        raise PlanError(f"a padded batch is planned for at most {MAX_INTEGERS:,} tokens, got {samples * positions:,}")
    mask = torch.ones((samples, positions), dtype=torch.long)
    mask[0, -1] = 0
    return mask


def _integers(value: int, *shape: int) -> torch.Tensor:
    if prod(shape) > MAX_INTEGERS:  # no code decides by values of so many, and they would take real memory
        return torch.empty(shape, dtype=torch.long, device="meta")
    return torch.full(shape, value, dtype=torch.long)


def longest_text(configuration: Any) -> int | None:
    """Returns the size of the table of learned positions; None where positions have no end, such as rotary ones."""
    text = configuration.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    rotary = hasattr(text, "rope_parameters") or hasattr(text, "rope_theta")
    return longest if isinstance(longest, int) and not rotary else None


def usual_positions(configuration: Any) -> int:
    """Returns how many tokens a text has where nobody says: 2048, or as many as the model has positions for."""
    longest = longest_text(configuration)
    return _POSITIONS if longest is None else min(_POSITIONS, longest)


def named_modules(text: str | None) -> tuple[str, ...] | None:
    """Returns the names of modules in a list such as `q_proj,v_proj`; None for `all-linear` and where there is none."""
    if text is None or text == "all-linear":
        return None
    return tuple(name.strip() for name in text.split(","))


def _check_positions(configuration: Any, positions: int) -> None:
    longest = longest_text(configuration)
    if longest is not None and positions > longest:
        raise PlanError(
            f"sequence length must be at most max_position_embeddings, {longest}, of this {configuration.model_type}, "
            f"got {positions}"
        )


def _image_shape(configuration: Any, settings: BatchSettings) -> tuple[int, ...]:
    vision = getattr(configuration, "vision_config", configuration)
    size = settings.image_size or getattr(vision, "image_size", None)
    if size is None:
        raise PlanError(
            f"the configuration of this {configuration.model_type} has no image_size: give the size of images"
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return settings.samples, getattr(vision, "num_channels", 3), height, width


def _with_adapters(model: nn.Module, rank: int, targets: tuple[str, ...] | None) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise PlanError(f"a plan with adapters needs peft ({error}): pip install peft") from error
    settings = LoraConfig(r=rank, target_modules="all-linear" if targets is None else list(targets))
    try:
        adapted: nn.Module = get_peft_model(model, settings)
    except ValueError as error:
        known = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise PlanError(
            f"no adapters for {', '.join(targets or ('all-linear',))}: the linear layers of this model are "
            f"{', '.join(known) or 'none'}"
        ) from error
    return adapted

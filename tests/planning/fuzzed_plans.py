"""Random and mutated configurations and arguments of `memtrace plan --config`, drawn from a seed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

_TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BASES: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", **_TEXT, "intermediate_size": 64, "num_key_value_heads": 2},
    {"model_type": "qwen2", **_TEXT, "intermediate_size": 64, "num_key_value_heads": 4, "tie_word_embeddings": True},
    {"model_type": "gemma", **_TEXT, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 8},
    {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    {"model_type": "bert", **_TEXT, "intermediate_size": 64, "architectures": ["BertForSequenceClassification"]},
    {"model_type": "distilbert", "vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    {"model_type": "t5", "vocab_size": 96, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64},
    {"model_type": "mixtral", **_TEXT, "intermediate_size": 64, "num_local_experts": 4, "num_key_value_heads": 2},
    {
        "model_type": "vit",
        **{name: size for name, size in _TEXT.items() if name != "vocab_size"},
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
    {"model_type": "mamba", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    {
        "model_type": "whisper",
        "vocab_size": 96,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_hidden_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "num_mel_bins": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
)
"""Small configurations that can be planned as they are."""

_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 3, 7, 33, 300, 5000, 10**9, 2**63, 2**70, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(True, False, None, "", "32", "relu", "\u0000\u202e", [], [1, 2], {}, {"type": "linear", "factor": 2.0}),
)
_EXTRA = (
    *("rope_parameters", "hidden_act", "torch_dtype", "dtype", "architectures", "tie_word_embeddings", "pad_token_id"),
    *("attn_implementation", "quantization_config", "num_labels", "is_encoder_decoder", "max_position_embeddings"),
    *("use_cache", "sliding_window", "layer_types", "auto_map", "id2label", "is_decoder", "num_key_value_heads"),
)
_OPTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--batch-size", ("1", "2", "3", "0", "-4", "2147483648", "two", "4294967296")),
    ("--seq-len", ("1", "5", "16", "0", "65", "1e3", "2147483648")),
    ("--image-size", ("8", "32", "33", "0", "100000")),
    ("--recipe", ("fp32", "hf-autocast", "pure-bf16", "bf16-master", "fp16-master", "megatron", "lora", "qlora", "x")),
    ("--optimizer", ("adamw", "sgd", "adafactor", "adamw8bit", "muon", "lbfgs", "sparseadam", "none", "lion")),
    ("--accumulation-steps", ("1", "2", "0", "-1")),
    ("--attn", ("eager", "sdpa", "flash_attention_2", "flex")),
    ("--dtype", ("float32", "bfloat16", "float16", "int8")),
    ("--lora-rank", ("1", "8", "0", "4097")),
    ("--kernels", ("cuda", "cpu")),
    ("--device", ("H100-80GB", "T4", "H101", "local")),
    ("--capacity", ("24GiB", "1KiB", "-1", "lots", "1e400GB")),
    ("--zero", ("0", "1", "2", "3", "4")),
    ("--world-size", ("1", "2", "8", "0", "1000001")),
    ("--offload", ("optimizer", "parameters")),
    ("--format", ("table", "markdown", "json", "yaml")),
    ("--constants", ("deepspeed",)),
    ("--params", ("8e9", "-1")),
)
_FLAGS = (
    *("--gradient-checkpointing", "--fused-optimizer", "--by-module", "--fsdp", "--ddp", "--overlap-comm", "--json"),
    *("--gradient-as-bucket-view", "--nonsense"),
)


def arguments_of(seed: int, directory: Path) -> list[str]:
    """Returns the arguments of one case, after writing its configuration into `directory`.

    Half of the configurations are not touched, and most arguments are such as people give: many cases end in a plan.
    """
    draw = random.Random(seed)
    document = copy.deepcopy(draw.choice(BASES))
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 3)):
            _mutate(document, draw)
    text = json.dumps(document)
    if draw.random() < 0.03:
        text = text[: draw.randrange(len(text))]
    path = directory / "config.json"
    path.write_text(text, encoding="utf-8")
    arguments = ["--config", str(path), "--seq-len", "12"]
    valid = draw.random() < 0.6
    for name, values in draw.sample(_OPTIONS, draw.randint(0, 3)):
        arguments += [name, draw.choice(values[: 2 if valid else None])]
    if draw.random() < 0.4:
        arguments.append(draw.choice(_FLAGS[: 3 if valid else None]))
    if draw.random() < 0.02:
        arguments += ["--capacity", "2GiB", "--find-max", draw.choice(("batch-size", "seq-len"))]
    return arguments


def _mutate(document: dict[str, Any], draw: random.Random) -> None:
    kind, name = draw.random(), draw.choice(list(document))
    if kind < 0.25:
        document.pop(name)
    elif kind < 0.75:
        document[name] = draw.choice(_VALUES)
    else:
        document[draw.choice(_EXTRA)] = draw.choice(_VALUES)
    if not document:
        document["model_type"] = "llama"

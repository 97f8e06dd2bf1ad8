"""Configurations of transformers: what is read, and what is refused with the name of the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtrace.errors import PlanError
from memtrace.simulation.models.configurations import configuration_of, load_configuration

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_file_and_its_directory_are_read(tmp_path: Path) -> None:
    """A path may name the file or the directory that a model was saved to."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for source in (tmp_path, tmp_path / "config.json"):
        assert load_configuration(str(source)).hidden_size == 64


def test_fields_may_have_the_names_of_their_model() -> None:
    """GPT-2 calls its sizes n_embd and n_layer; either name will do."""
    own = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
    common = {
        "model_type": "gpt2",
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert configuration_of(own, "own").hidden_size == configuration_of(common, "common").n_embd == 64


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(field: str) -> None:
    """transformers would take the size of its smallest or largest known model instead."""
    document = {name: value for name, value in LLAMA.items() if name != field}
    with pytest.raises(PlanError, match=f"config.json has no {field}: without it the size of the model is not known"):
        configuration_of(document, "config.json")


def test_a_size_that_is_missing_in_a_part_is_named_with_the_part() -> None:
    """A vision-language model has a configuration for each of its parts."""
    document = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 64}, "vision_config": {}}
    with pytest.raises(PlanError, match=r"config\.json, (text|vision)_config has no"):
        configuration_of(document, "config.json")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must hold one JSON object, got list"),
        ({}, "has no model_type"),
        ({"model_type": 3}, "has no model_type"),
        ({"model_type": "lama"}, "unknown model_type 'lama': did you mean 'llama'"),
        ({"model_type": "something-of-mine"}, "use memtrace.plan from Python"),
        (LLAMA | {"hidden_size": "64"}, "Validation error for field 'hidden_size'"),
        (LLAMA | {"num_attention_heads": 7}, "hidden size .64. is not a multiple of the number of attention heads"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096, got 1000000000"),
        (LLAMA | {"num_labels": 10**9}, "num_labels must be at most 1048576, got 1000000000"),
    ],
)
def test_what_is_no_configuration_is_said(document: Any, message: str) -> None:
    """The message names the source, the field and what was expected."""
    with pytest.raises(PlanError, match=f"(?s)config.json.*{message}"):
        configuration_of(document, "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[" * 100_000, "is not JSON")],
)
def test_a_file_that_is_not_json_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    """Neither broken text nor broken bytes are another exception."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_configuration(str(path))


def test_a_path_without_a_configuration_is_said(tmp_path: Path) -> None:
    """A directory without config.json and a file that is not there are no names on the hub."""
    for source in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(PlanError, match="is no configuration"):
            load_configuration(str(source))


def test_a_name_that_the_hub_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, or with a wrong name, the name is repeated."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        PlanError, match="'nobody/nothing' is neither a file here nor a configuration that the hub gives"
    ):
        load_configuration("nobody/nothing")

"""Weights, gradients and each optimizer state of a history by the sizes of a model alone, against what is known."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import model_families
import pytest
import torch
import transformers
from model_families import own_loss
from planning import larger_families

from memtrace.errors import ConfigError, OutputError
from memtrace.forensics.attribution.expected import ExpectedModel, expected_model, sizes_of
from memtrace.forensics.attribution.joined import Attributed, attribute
from memtrace.forensics.history import read_history
from memtrace.forensics.loader import load_snapshot
from memtrace.forensics.reading import read_snapshot
from memtrace.record.categories import Category, Moment
from memtrace.record.readings.snapshot_reading import SnapshotMoment, Source
from tests.forensics.simulated import Recorded, record, snapshot_of

SIZE, WIDTH = larger_families.SIZE, larger_families._WIDTH
CLOSE = 0.01
TOLD = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)

FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Any]]] = {
    "llama": (larger_families._llama, SIZE.sequence_to_sequence),
    "gpt2": (lambda: model_families.gpt2(SIZE, 192, 3, 6), SIZE.sequence_to_sequence),
    "bert": (lambda: model_families.bert(SIZE, **WIDTH), SIZE.classified_text),
    "t5": (lambda: model_families.t5(SIZE, **larger_families._T5), SIZE.sequence_to_sequence),
    "qwen3": (larger_families._qwen3, SIZE.sequence_to_sequence),
    "vit": (lambda: model_families.vit(SIZE, **WIDTH), SIZE.images),
    "gemma2": (larger_families._gemma2, SIZE.sequence_to_sequence),
    "distilbert": (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(vocab_size=512, dim=192, n_layers=3, n_heads=6, hidden_dim=512)
        ),
        SIZE.classified_text,
    ),
    "mistral": (
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=512, **larger_families._GROUPED)),
        SIZE.sequence_to_sequence,
    ),
    "albert": (
        lambda: transformers.AlbertForSequenceClassification(
            transformers.AlbertConfig(vocab_size=512, embedding_size=64, **WIDTH)
        ),
        SIZE.classified_text,
    ),
    "swin": (larger_families._swin, SIZE.images),
    "mixtral": (lambda: larger_families._mixtral("grouped_mm"), SIZE.sequence_to_sequence),
    "phi": (
        lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZE.text, **larger_families._GROUPED)),
        SIZE.sequence_to_sequence,
    ),
    "phi3": (
        lambda: transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**SIZE.text, **larger_families._GROUPED, pad_token_id=0)
        ),
        SIZE.sequence_to_sequence,
    ),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=512, hidden_size=192, n_layer=3, n_head=6)
        ),
        SIZE.sequence_to_sequence,
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=512,
                hidden_size=192,
                num_hidden_layers=3,
                num_attention_heads=6,
                ffn_dim=512,
                word_embed_proj_dim=192,
                max_position_embeddings=128,
            )
        ),
        SIZE.sequence_to_sequence,
    ),
    "gpt-neox": (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE.text, **WIDTH)),
        SIZE.sequence_to_sequence,
    ),
    "starcoder2": (
        lambda: transformers.Starcoder2ForCausalLM(
            transformers.Starcoder2Config(**SIZE.text, **larger_families._GROUPED)
        ),
        SIZE.sequence_to_sequence,
    ),
}

CASES = [
    ("llama", "fp32", "adamw", 1),
    ("llama", "megatron", "adamw", 1),
    ("llama", "fp32", "sgd-momentum", 2),
    ("gpt2", "hf-autocast", "adamw", 1),
    ("bert", "pure-bf16", "adamw", 1),
    ("t5", "bf16-master", "adamw", 1),
    ("qwen3", "fp16-master", "adamw", 2),
    ("vit", "hf-autocast", "adamw-amsgrad", 1),
    ("bert", "fp32", "adamw8bit", 2),
    ("swin", "fp32", "adamw", 1),
    ("distilbert", "pure-bf16", "adamw8bit", 4),
    ("mistral", "hf-autocast", "adamw8bit", 1),
    ("albert", "pure-bf16", "sgd-momentum", 1),
    ("qwen3", "pure-bf16", "adamw8bit", 2),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            ("gpt2", "fp32", "sgd-momentum", 1),
            ("llama", "bf16-master", "adamw", 2),
            ("bert", "pure-bf16", "sgd", 1),
            ("t5", "hf-autocast", "adamw", 4),
            ("bert", "fp32", "adamw8bit", 1),
            ("llama", "bf16-master", "adamw8bit", 2),
            ("gpt2", "pure-bf16", "adamw8bit", 1),
            ("qwen3", "pure-bf16", "adamw8bit", 1),
            ("gemma2", "pure-bf16", "adamw8bit", 2),
            ("gemma2", "hf-autocast", "sgd-momentum", 4),
            ("mixtral", "pure-bf16", "adamw", 1),
            ("vit", "fp32", "sgd-momentum", 4),
            ("bert", "bf16-master", "adamw", 4),
            # Drawn at random after the rules were made, as DistilBERT, Mistral and ALBERT above:
            ("phi", "megatron", "adamw", 1),
            ("phi", "hf-autocast", "adamw8bit", 2),
            ("phi3", "hf-autocast", "adamw", 1),
            ("bloom", "megatron", "adamw-amsgrad", 2),
            ("opt", "bf16-master", "adamw-amsgrad", 4),
            ("gpt-neox", "hf-autocast", "sgd-momentum", 4),
            ("starcoder2", "fp32", "adamw8bit", 4),
            ("mistral", "pure-bf16", "adamw8bit", 4),
            ("gpt2", "pure-bf16", "adamw-amsgrad", 4),
            ("albert", "pure-bf16", "sgd-momentum", 4),
        )
    ),
]


def recorded_run(family: str, recipe: str, optimizer: str = "adamw", accumulation: int = 1) -> Recorded:
    make_model, make_batch = FAMILIES[family]
    return record(make_model, make_batch, own_loss, recipe=recipe, optimizer=optimizer, accumulation_steps=accumulation)


def configured(family: str, directory: Path) -> ExpectedModel:
    """What the `config.json` that a model of the family would be saved with says of sizes."""
    with torch.device("meta"):
        model: Any = FAMILIES[family][0]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    return expected_model(directory / "config.json")


def attributed(content: dict[str, Any], directory: Path, model: ExpectedModel | None) -> Attributed:
    path = directory / "snapshot.pickle"
    path.write_bytes(pickle.dumps(content, protocol=4))
    snapshot = load_snapshot(path)
    return attribute(read_history(snapshot, 0), snapshot.stacks, model)


def told(found: Attributed, position: int) -> Counter[tuple[Category, str]]:
    """Bytes of each category and width of the elements; optimizer states apart."""
    sizes: Counter[tuple[Category, str]] = Counter()
    for index in found.history.live(position):
        label = found.label(index)
        if label.category in TOLD:
            sizes[label.category, label.component] += found.history.timeline.lifetimes[index].nbytes
    return sizes


def known(recorded: Recorded, moment: Moment = Moment.PEAK) -> Counter[tuple[Category, str]]:
    sizes: Counter[tuple[Category, str]] = Counter()
    for key, nbytes in recorded.run.moments[moment].entries.items():
        if key.category in TOLD:
            sizes[key.category, key.component] += nbytes
    return sizes


@pytest.mark.parametrize(("family", "recipe", "optimizer", "accumulation"), CASES)
def test_sizes_alone_tell_what_outlives_steps_and_the_gradients(tmp_path, family, recipe, optimizer, accumulation):
    """At the peak and at the end each is within 1 % of what is known: nothing but a configuration's sizes is given."""
    recorded, model = recorded_run(family, recipe, optimizer, accumulation), configured(family, tmp_path)
    found = attributed(recorded.snapshot, tmp_path, model)
    assert found.history.complete
    for moment, position in ((Moment.PEAK, found.history.peak), (Moment.STEP_END, found.history.end)):
        expected, seen = known(recorded, moment), told(found, position)
        for key in {*expected, *seen}:
            assert abs(expected[key] - seen[key]) <= CLOSE * expected[key], (moment, key)
    assert all(found.label(index).source is Source.SIZE for index in found.lives.persistent)


def test_a_ring_that_lost_the_beginning_and_a_failure_in_the_second_step(tmp_path):
    """Weights and states are told where the ring lost their birth, and where the second step's forward pass failed."""
    recorded, model = recorded_run("gpt2", "fp32"), configured("gpt2", tmp_path)
    whole = sum(size * count for size, count in model.parameters.items()) * 4
    trace = recorded.snapshot["device_traces"][0]
    late = attributed(snapshot_of(recorded.run, 700), tmp_path, model)
    assert late.history.complete
    assert told(late, late.history.peak) == known(recorded)

    births = [number for number, entry in enumerate(trace) if entry["action"] == "alloc"]
    content = snapshot_of_first(trace, births[len(births) * 3 // 4], recorded.snapshot)
    content["device_traces"][0].append({"action": "oom", "size": 1 << 30, "stream": 0, "device_free": 1 << 20})
    path = tmp_path / "failed.pickle"
    path.write_bytes(pickle.dumps(content))
    device = read_snapshot(load_snapshot(path), "failed", model).devices[0]
    failure = device.moments[SnapshotMoment.FAILURE]
    sizes = failure.by_category()
    assert sizes[Category.WEIGHTS] == whole
    assert sizes[Category.OPTIMIZER_STATE] == 2 * whole
    assert sizes[Category.ACTIVATIONS] > 0
    assert device.failure is not None and device.failure.requested_bytes == 1 << 30
    assert failure.total_bytes == sum(block["requested_size"] for block in content["segments"][0]["blocks"])
    assert {remedy.kind.value for remedy in device.remedies} >= {"sharding", "8bit_optimizer"}


def snapshot_of_first(trace: list[dict[str, Any]], stop: int, whole: dict[str, Any]) -> dict[str, Any]:
    """What the snapshot would have been after the first entries."""
    live: dict[int, int] = {}
    for entry in trace[:stop]:
        if entry["action"] == "alloc":
            live[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            del live[entry["addr"]]
    blocks = [
        {"address": address, "size": size, "requested_size": size, "state": "active_allocated"}
        for address, size in live.items()
    ]
    return {"segments": [{**whole["segments"][0], "blocks": blocks}], "device_traces": [trace[:stop]]}


def test_a_model_is_known_by_its_configuration_and_by_the_heads_of_its_checkpoint(tmp_path):
    """Both name the same sizes; of the checkpoint no weight is read."""
    with torch.device("meta"):
        model = larger_families._llama()
    (tmp_path / "config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
    heads = {
        name: {"dtype": "BF16", "shape": [*parameter.shape], "data_offsets": [0, 0]}
        for name, parameter in model.named_parameters()
    }
    files = tmp_path / "checkpoint"
    files.mkdir()
    for number, names in enumerate((list(heads)[:5], list(heads)[5:])):
        text = json.dumps({"__metadata__": {"format": "pt"}, **{name: heads[name] for name in names}}).encode()
        (files / f"model-{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    weight_map = {name: f"model-{int(place >= 5)}.safetensors" for place, name in enumerate(heads)}
    (files / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    configured, indexed = expected_model(tmp_path), expected_model(files)
    (files / "model.safetensors.index.json").unlink()
    for other in (indexed, expected_model(files)):
        assert other.parameters == configured.parameters
        assert other.matrices == configured.matrices
    assert configured.elements == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.safetensors", b"\xff" * 20, "no file of safetensors"),
        ("m.safetensors", b"", "no file of safetensors"),
        ("m.safetensors", (9).to_bytes(8, "little") + b'{"a": 1}', "no JSON where it should be|has no shape"),
        ("m.safetensors", (12).to_bytes(8, "little") + b'{"a": [-1]} ', "has no shape"),
        ("x.index.json", b"[]", "must hold one JSON object"),
        ("x.index.json", b'{"weight_map": {"a": 1}}', "must have a 'weight_map'"),
    ],
)
def test_a_checkpoint_that_cannot_be_understood_is_refused(tmp_path, name, content, said):
    """The message names the file and what it lacks."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        expected_model(path)


def test_a_directory_without_a_model_and_a_missing_file_are_refused(tmp_path):
    """As any file that a user names."""
    with pytest.raises(ConfigError, match=r"no config\.json and no checkpoint"):
        expected_model(tmp_path)
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "../../b.safetensors"}}', encoding="utf-8")
    with pytest.raises(OutputError, match=r"b\.safetensors cannot be read"):
        expected_model(tmp_path / "x.index.json")


def test_sizes_of_another_model_tell_nothing(tmp_path):
    """Then nothing is claimed, and the reading says that the sizes do not fit."""
    recorded = recorded_run("gpt2", "fp32", "sgd")
    other = sizes_of([(1000, 7), (13, 13), (31,)])
    found = attributed(recorded.snapshot, tmp_path, other)
    assert Source.SIZE not in {label.source for label in found.labels.values() if label.category in TOLD}


def test_8_bit_states_are_told_with_their_scales_beside_gradients_that_stay(tmp_path):
    """Small parameters have float32 states; float32 blocks beyond the weights are gradients, and no further state."""
    sizes = [(64, 100), (5000,), (100,)]
    groups = [[prod(shape) * 4 for shape in sizes]] * 2 + [[6400, 100, 5000, 80, 400]] * 2
    blocks = [
        {"address": place << 20, "size": size, "requested_size": size, "state": "active_allocated"}
        for place, size in enumerate(size for group in groups for size in group)
    ]
    segment = {"device": 0, "address": 0, "total_size": 1 << 30, "stream": 0, "blocks": blocks}
    content = {"segments": [segment], "device_traces": []}
    found = attributed(content, tmp_path, sizes_of(sizes))
    assert told(found, found.history.end) == {
        (Category.WEIGHTS, "trainable"): 46_000,
        (Category.GRADIENTS, ""): 46_000,
        **{(Category.OPTIMIZER_STATE, f"state{number}"): 11_800 for number in (1, 2)},
        **{(Category.OPTIMIZER_STATE, f"absmax{number}"): 180 for number in (1, 2)},
    }

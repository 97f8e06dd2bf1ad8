"""`memtrace plan --config`: a plan from the configuration of a model, and the questions asked of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from memtrace.cli import main
from memtrace.record.plan import read_plan

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The path of a small Llama."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, output, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(output)


def test_the_table_says_what_was_simulated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, parameters, recipe and batch in the headline; reserved bytes below."""
    status, output, _ = run(capsys, "--config", config, "--batch-size", "2", "--seq-len", "32", "--recipe", "fp32")
    assert status == 0
    assert output.startswith("llama · ")
    assert "fp32 · adamw · batch 2 x 32" in output
    assert "reserved by the allocator" in output


def test_json_is_a_plan_that_can_be_read(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The contract's document, with the four moments and what the allocator reserves."""
    found = document(capsys, "--config", config, "--seq-len", "32")
    (tmp_path / "plan.json").write_text(json.dumps(found))
    plan = read_plan(tmp_path / "plan.json")
    assert {moment.value for moment in plan.moments} == {"forward_end", "backward_end", "step_end", "peak"}
    assert plan.reserved_bytes == found["reserved_bytes"] > plan.total_bytes
    assert plan.setup["model"] == "llama"


def test_options_change_the_plan(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A longer text, checkpointing, other weights, adapters and a fused step each have their effect."""
    base = ["--config", config, "--seq-len", "64", "--batch-size", "4", "--recipe", "fp32"]
    usual = document(capsys, *base)["total_bytes"]

    def total(*options: str) -> int:
        return int(document(capsys, *base, *options)["total_bytes"])

    assert total("--batch-size", "8") > usual
    assert total("--gradient-checkpointing") < usual
    assert total("--dtype", "bfloat16") < usual
    assert total("--recipe", "lora", "--lora-rank", "2") < usual
    assert total("--recipe", "pure-bf16", "--attn", "eager") > total("--recipe", "pure-bf16")
    assert total("--accumulation-steps", "2") > usual
    assert total("--seq-len", "8", "--fused-optimizer") < total("--seq-len", "8")
    assert document(capsys, *base, "--kernels", "cpu")["reserved_bytes"] is None


@pytest.mark.parametrize("share", [[], ["--zero", "2", "--world-size", "2"], ["--fsdp", "--world-size", "2"]])
def test_adapters_have_the_rank_and_the_places_that_are_asked_for(
    config: str, share: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone and on several ranks: rank 4 on the queries (64 to 64) and the values (64 to 32) of both layers."""
    words = ["--config", config, "--seq-len", "16", "--recipe", "qlora", "--lora-rank", "4"]
    found = document(capsys, *words, "--lora-targets", "q_proj,v_proj", *share)
    assert found["setup"]["trainable_parameters"] == 2 * 4 * (64 + 64 + 64 + 32)


def test_what_the_loop_keeps_and_pads_is_planned(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--keep-outputs`: between steps the logits are still there; `--padded`: attention has a mask for all pairs."""
    base = ["--config", config, "--seq-len", "64", "--batch-size", "4", "--recipe", "pure-bf16"]

    def ends(*options: str) -> dict[str, int]:
        moments = document(capsys, *base, *options)["moments"]
        return {name: sum(entry["bytes"] for entry in moments[name]["entries"]) for name in ("forward_end", "step_end")}

    usual, kept, padded = ends(), ends("--keep-outputs"), ends("--padded")
    logits = 2 * 4 * 64 * LLAMA["vocab_size"]
    assert logits <= kept["step_end"] - usual["step_end"] <= logits + 512  # and the loss
    assert padded["forward_end"] - usual["forward_end"] >= 4 * 64 * 64


def test_the_largest_batch_that_fits_is_found(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is found fits, and one more does not."""
    options = ["--config", config, "--seq-len", "32", "--capacity", "1200MiB"]
    status, output, _ = run(capsys, *options, "--find-max", "batch-size", "--json")
    assert status == 0
    found = json.loads(output)
    largest = found["setup"]["largest_batch_size"]
    assert found["verdict"] == "fits"
    status, output, _ = run(capsys, *options, "--batch-size", str(largest + 1), "--json")
    assert (status, json.loads(output)["verdict"]) == (1, "uncertain")


def test_the_longest_text_ends_with_the_table_of_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 cannot read more than it has positions for, whatever fits."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    found = document(capsys, "--config", str(tmp_path), "--capacity", "80GB", "--find-max", "seq-len")
    assert found["setup"]["largest_seq_len"] == 128


def test_a_text_is_as_long_as_the_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --seq-len a model with fewer than 2,048 positions gets texts that fill them."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert document(capsys, "--config", str(tmp_path))["setup"]["batch"] == "1 x 128"


@pytest.mark.parametrize(
    ("options", "kept"),
    [(["--device", "H200"], 64 * 2**20), (["--device", "A100-80GB"], 17_039_360), (["--capacity", "80GB"], 17_039_360)],
)
def test_the_device_says_what_cublas_keeps(
    config: str, capsys: pytest.CaptureFixture[str], options: list[str], kept: int
) -> None:
    """From Hopper on four times as much as before; a capacity says nothing of the kind of device."""
    found = document(capsys, "--config", config, "--seq-len", "16", *options)["moments"]["peak"]["entries"]
    assert [entry["bytes"] for entry in found if entry["category"] == "workspaces"] == [kept]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "lists of parameters (foreach)"),
        (["--fused-optimizer"], "step is fused"),
        (["--fused-optimizer", "--optimizer", "rmsprop"], "lists of parameters (foreach)"),
    ],
)
def test_how_the_optimizer_steps_is_said(
    config: str, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    """A fused step has no temporaries, which can be the peak; not every optimizer has one."""
    assumptions = document(capsys, "--config", config, "--seq-len", "16", "--recipe", "fp32", *options)["assumptions"]
    assert [said in sentence for sentence in assumptions if "optimizer" in sentence] == [True]


def test_no_end_of_a_search_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recurrent model, whose code takes twice as long for twice the length, is refused after two lengths."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    status, _, error = run(capsys, "--config", str(tmp_path), "--capacity", "2GiB", "--find-max", "seq-len")
    assert status == 2
    assert "goes through positions one by one" in error


def test_a_search_without_a_device_or_room_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is missing, or that not even one sample fits."""
    status, _, error = run(capsys, "--config", config, "--find-max", "batch-size")
    assert status == 2
    assert "--find-max batch-size needs a device to fit: give --device or --capacity" in error
    status, _, error = run(capsys, "--config", config, "--find-max", "batch-size", "--capacity", "1MiB")
    assert status == 2
    assert "--find-max batch-size on 1MiB: not even 1 fits" in error


def test_remedies_are_simulated_and_ranked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each leaves what it says it saves, the largest saving first."""
    found = document(
        capsys, "--config", config, "--seq-len", "256", "--batch-size", "4", "--recipe", "fp32", "--what-if"
    )
    names = [remedy["name"] for remedy in found["remedies"]]
    savings = [remedy["saved_bytes"] for remedy in found["remedies"]]
    assert savings == sorted(savings, reverse=True)
    assert {"gradient checkpointing", "bfloat16 throughout, no master copies", "a chunked loss", "LoRA"} <= set(names)
    assert {"8-bit AdamW", "FSDP over 8 GPUs"} <= set(names)
    assert all(remedy["total_bytes"] + remedy["saved_bytes"] == found["total_bytes"] for remedy in found["remedies"])


def test_remedies_keep_to_the_ranks_that_there_are(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From ZeRO-1 on two ranks, FSDP on two ranks is proposed."""
    found = document(capsys, "--config", config, "--seq-len", "32", "--zero", "1", "--world-size", "2", "--what-if")
    ranks = {remedy["name"]: remedy["world_size"] for remedy in found["remedies"]}
    assert ranks["FSDP over 2 GPUs"] == 2


def test_nothing_but_the_answer_is_said(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What transformers, peft and bitsandbytes remark on the way stays out of the terminal."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        assert (
            main(["plan", "--config", config, "--seq-len", "32", "--recipe", "lora", "--gradient-checkpointing"]) == 0
        )
    assert (capfd.readouterr().err, remarks) == ("", [])


def test_further_models_are_held_beside_the_trained_one(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration runs and a count is held, each a component of its own; without one of them is a remedy."""
    options = ["--config", config, "--seq-len", "32", "--recipe", "fp32", "--batch-size", "2"]
    named = ["--further-model", f"teacher={config}:bfloat16", "--further-model", "average=150848"]
    found = document(capsys, *options, *named, "--what-if")
    components = {
        (entry["component"], entry["dtype"]): entry["bytes"]
        for entry in found["moments"]["peak"]["entries"]
        if entry["category"] == "weights"
    }
    assert components["teacher", "bfloat16"] == 2 * 150848
    assert components["average", "float32"] == components["trainable", "float32"] == 4 * 150848
    assert found["setup"]["further_models"] == "teacher, average"
    assert "outputs of average computed before the training" in [remedy["name"] for remedy in found["remedies"]]
    _, table, _ = run(capsys, *options, *named)
    assert "beside teacher, average" in table


def test_modules_are_listed_by_what_they_made(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In JSON, in markdown and in the table; all of them add up to the activations."""
    options = ["--config", config, "--seq-len", "64", "--by-module"]
    found = document(capsys, *options)
    forward_end = found["moments"]["forward_end"]["entries"]
    activations = sum(entry["bytes"] for entry in forward_end if entry["category"] == "activations")
    assert sum(module["bytes"] for module in found["modules"]) == activations
    names = {module["name"]: module["modules"] for module in found["modules"]}
    assert names["model.layers.*.mlp.up_proj"] == 2
    for form in ("table", "markdown"):
        _, output, _ = run(capsys, *options, "--format", form)
        assert "model.layers.*.mlp" in output.replace("\\*", "*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--params", "8e9", "--batch-size", "2"], "--batch-size needs --config"),
        (["--params", "8e9", "--by-module"], "--by-module needs --config"),
        (["--config", "CONFIG", "--params", "8e9"], "--params is for plans from a parameter count"),
        (["--config", "CONFIG", "--activation-ratio", "0.3"], "--activation-ratio is for plans from a parameter count"),
        (["--config", "CONFIG", "--constants", "deepspeed"], "--constants deepspeed is a formula"),
        (["--config", "missing.json"], "missing.json is no configuration"),
        (["--config", "CONFIG", "--batch-size", "0"], "batch size must be 1.."),
        (["--config", "CONFIG", "--dtype", "float32"], "bf16-master keeps float32 copies of 16-bit weights"),
        (["--config", "CONFIG", "--lora-rank", "0"], "rank of adapters must be 1..4096"),
        (["--config", "CONFIG", "--optimizer", "lbfgs"], "lbfgs cannot be simulated"),
        (["--params", "8e9", "--further-model", "ref=./config.json"], "ref=./config.json needs --config"),
        (["--config", "CONFIG", "--further-model", "ref=./missing.json"], "missing.json is no configuration"),
        (["--config", "CONFIG", "--further-model", "8e9"], "must be NAME=COUNT or NAME=CONFIG"),
        (["--config", "CONFIG", "--further-model", "ref="], "must be NAME=COUNT or NAME=CONFIG"),
        (["--params", "8e9", "--further-model", "ref=0"], "parameters of ref must be 1.."),
        (["--params", "8e9", "--further-model", "frozen=8e9"], "neither 'trainable' nor 'frozen'"),
    ],
)
def test_what_cannot_be_planned_is_said(
    config: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """One line that names the option, and exit status 2."""
    status, output, error = run(capsys, *(config if option == "CONFIG" else option for option in options))
    assert (status, output) == (2, "")
    assert message in error

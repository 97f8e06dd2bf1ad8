"""Sharded plans that the live tests of tests/engines do not run: what is refused, larger thresholds, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memtrace.categories import Category, Moment
from memtrace.cli import main
from memtrace.errors import PlanError
from memtrace.planning.plan import Plan
from memtrace.planning.sharding import Offload, Sharding, Strategy, Zero3Settings
from memtrace.planning.simulate import plan

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    use_cache=False,
    architectures=["LlamaForCausalLM"],
)


def planned(sharding: Sharding, recipe: str = "bf16-master", *, checkpointing: bool = False) -> Plan:
    def build() -> LlamaForCausalLM:
        model = LlamaForCausalLM(CONFIG)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    words = torch.ones(1, 16, dtype=torch.long)
    return plan(build, lambda: {"input_ids": words, "labels": words}, recipe=recipe, sharding=sharding)


def zero3(*, world_size: int = 4, **thresholds: int) -> Sharding:
    return Sharding(
        strategy=Strategy.ZERO3, world_size=world_size, reduce_bucket=10_000, zero3=Zero3Settings(**thresholds)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero_3_with_small_thresholds_holds_few_whole_weights(checkpointing: bool) -> None:
    """Layers are released after use and gathered again; with the defaults a small model is whole all the time."""
    few = planned(
        zero3(prefetch_bucket=10_000, max_live=20_000, max_reuse=0, persistence_threshold=0),
        checkpointing=checkpointing,
    )
    all_of_it = planned(zero3(persistence_threshold=0), checkpointing=checkpointing)
    held, whole = (made.moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] for made in (few, all_of_it))
    assert whole > 0.9 * 2 * int(all_of_it.setup["parameters"])
    assert held < 0.25 * whole
    assert few.total_bytes < all_of_it.total_bytes


def test_sub_groups_of_zero_3_have_the_same_states_between_them() -> None:
    """Masters and shards do not depend on how many of them are updated at a time."""
    one, several = planned(zero3()), planned(zero3(sub_group=5_000))
    for category in (Category.MASTER_WEIGHTS, Category.WEIGHTS):
        assert one.moments[Moment.STEP_END][category] == several.moments[Moment.STEP_END][category]


@pytest.mark.parametrize(
    ("sharding", "recipe", "message"),
    [
        (Sharding(strategy=Strategy.ZERO2, world_size=2, offload=Offload.OPTIMIZER), "bf16-master", "offloading"),
        (Sharding(strategy=Strategy.ZERO2, world_size=2), "hf-autocast", "bf16-master"),
        (Sharding(strategy=Strategy.DDP, world_size=2), "bf16-master", "--zero 0"),
    ],
)
def test_what_is_not_simulated_is_refused(sharding: Sharding, recipe: str, message: str) -> None:
    """Nothing is left out in silence."""
    with pytest.raises(PlanError, match=message):
        planned(sharding, recipe)


@pytest.mark.parametrize("options", [["--zero", "1"], ["--zero", "2"], ["--zero", "3"], ["--fsdp"]])
def test_the_command_shards(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masters over four ranks are a quarter of what one rank has, padding aside."""
    CONFIG.save_pretrained(tmp_path)
    sizes = []
    for sharded in ([], [*options, "--world-size", "4"]):
        main(["plan", "--config", str(tmp_path), "--seq-len", "16", "--recipe", "bf16-master", *sharded, "--json"])
        entries = json.loads(capsys.readouterr().out)["moments"]["step_end"]["entries"]
        sizes.append(sum(entry["bytes"] for entry in entries if entry["category"] == "master_weights"))
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.01)

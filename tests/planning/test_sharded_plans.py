"""Sharded plans that the live tests of tests/engines do not run: what is refused, larger thresholds, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from memtrace.cli import main
from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.simulated import StepKernels
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.deepspeed_settings import read_deepspeed
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy, Zero3Settings
from memtrace.planning.simulate import plan, step_kernels
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import Plan
from memtrace.simulation.kernels import Target

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    use_cache=False,
    architectures=["LlamaForCausalLM"],
)


def planned(
    sharding: Sharding, recipe: str = "bf16-master", *, checkpointing: bool = False, config: LlamaConfig = CONFIG
) -> Plan:
    def build() -> LlamaForCausalLM:
        model = LlamaForCausalLM(config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    words = torch.ones(1, 16, dtype=torch.long)
    return plan(build, lambda: {"input_ids": words, "labels": words}, recipe=recipe, sharding=sharding)


def zero3(*, world_size: int = 4, **thresholds: int) -> Sharding:
    return Sharding(
        strategy=Strategy.ZERO3, world_size=world_size, reduce_bucket=10_000, zero3=Zero3Settings(**thresholds)
    )


FSDP2 = pytest.mark.needs("FSDP2 that runs without a GPU")
OFFLOADS = [
    (Strategy.ZERO1, Offload.OPTIMIZER, "hf-autocast"),
    (Strategy.ZERO2, Offload.OPTIMIZER, "bf16-master"),
    (Strategy.ZERO2, Offload.OPTIMIZER, "qlora"),
    (Strategy.ZERO3, Offload.OPTIMIZER, "lora"),
    (Strategy.ZERO3, Offload.PARAMETERS, "qlora"),
    pytest.param(Strategy.FSDP, Offload.PARAMETERS, "hf-autocast", marks=FSDP2),
    pytest.param(Strategy.FSDP, Offload.PARAMETERS, "lora", marks=FSDP2),
]


@pytest.mark.parametrize(("strategy", "offload", "recipe"), OFFLOADS)
def test_what_is_offloaded_is_the_hosts(strategy: Strategy, offload: Offload, recipe: str) -> None:
    """Masters, states and gradients leave the device, the shards of weights where they are offloaded, too; what leaves
    is on the host, and buffers stay."""
    sharding = Sharding(
        strategy=strategy, world_size=2, reduce_bucket=10_000, zero3=Zero3Settings(persistence_threshold=0)
    )
    before, after = planned(sharding, recipe), planned(replace(sharding, offload=offload), recipe)
    moments = [made.moments[Moment.STEP_END] for made in (before, after)]
    left = moments[0].total_bytes - moments[1].total_bytes
    assert after.moments[Moment.PEAK].total_bytes < before.moments[Moment.PEAK].total_bytes
    for category in (Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE, Category.GRADIENTS):
        assert moments[1][category] <= 8, "a norm"
    kept = moments[0][Category.WEIGHTS] if offload is Offload.OPTIMIZER else _packed_beside_shards(before, recipe)
    assert moments[1][Category.WEIGHTS] == kept
    assert before.host_bytes == 0
    assert 0 < left <= after.host_bytes
    assert after.setup["offload"] == offload.value
    assert any("in the memory of the host" in said for said in after.assumptions)


def _packed_beside_shards(plan: Plan, recipe: str) -> int:
    """Bytes of the scales of 4-bit weights, which are not shared out and not offloaded."""
    entries = plan.moments[Moment.STEP_END].entries
    scales = ("uint8", "float32") if recipe == "qlora" else ()
    return sum(size for key, size in entries.items() if key.component == "frozen" and key.dtype in scales)


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


class Attention(nn.Module):
    """Attention takes the weight of its last layer itself, without running that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.attention(words, words, words)[0].sum()


def test_zero_3_gathers_what_a_module_takes_of_another() -> None:
    """Such a weight is gathered when it is used, and released with the module that used it."""
    made = plan(
        Attention,
        lambda: torch.ones(8, 2, 64),
        recipe="bf16-master",
        loss=lambda model, words: model(words.bfloat16()),
        sharding=zero3(persistence_threshold=0, max_reuse=0),
    )
    assert made.moments[Moment.STEP_END][Category.TRANSIENT_WEIGHTS] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_of_zero_3_alone_gathers_nothing(*, tied: bool) -> None:
    """Its shards are the weights, all in one storage: what is saved for the backward pass is known by its place."""
    config = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": tied})
    made = planned(zero3(world_size=1, persistence_threshold=0), config=config).moments[Moment.FORWARD_END]
    assert made[Category.TRANSIENT_WEIGHTS] == 0
    assert made[Category.WEIGHTS] == 2 * sum(p.numel() for p in LlamaForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("sharding", "recipe", "message"),
    [
        (Sharding(strategy=Strategy.DDP, world_size=2), "bf16-master", "--zero 0"),
    ],
)
def test_what_is_not_simulated_is_refused(sharding: Sharding, recipe: str, message: str) -> None:
    """Nothing is left out in silence."""
    with pytest.raises(PlanError, match=message):
        planned(sharding, recipe)


def test_fsdp2_that_needs_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of torch 2.6 is, with what to do instead; no process group is left."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(PlanError, match="does not run without a GPU; give --params instead of --config"):
        planned(Sharding(strategy=Strategy.FSDP, world_size=2), "bf16-master")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "options", [["--zero", "1"], ["--zero", "2"], ["--zero", "3"], pytest.param(["--fsdp"], marks=FSDP2)]
)
def test_the_command_shards(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masters over four ranks are a quarter of what one rank has, padding aside."""
    CONFIG.save_pretrained(tmp_path)
    sizes = []
    for sharded in ([], [*options, "--world-size", "4"]):
        main(["plan", "--config", str(tmp_path), "--seq-len", "16", "--recipe", "bf16-master", *sharded, "--json"])
        entries = json.loads(capsys.readouterr().out)["moments"]["step_end"]["entries"]
        sizes.append(sum(entry["bytes"] for entry in entries if entry["category"] == "master_weights"))
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.01)


def test_the_command_reads_a_configuration_of_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` follows from the width of the model, as Trainer fills it in."""
    CONFIG.save_pretrained(tmp_path)
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    main(
        [
            "plan",
            "--config",
            str(tmp_path),
            "--seq-len",
            "16",
            "--deepspeed",
            str(settings),
            "--world-size",
            "2",
            "--json",
        ]
    )
    plan = json.loads(capsys.readouterr().out)
    reduce = [entry["bytes"] for entry in plan["moments"]["step_end"]["entries"] if entry["component"] == "reduce"]
    assert plan["setup"]["strategy"] == "zero3"
    assert reduce == [2 * 64 * 64]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 4}, "stage: must be 0..3, got 4"),
        ({"stage": 2, "contiguous_gradients": False}, "contiguous_gradients: only true is simulated, got False"),
        ({"stage": 2, "reduce_bucket_size": "big"}, "reduce_bucket_size: must be a whole number, got 'big'"),
        ({"stage": 2, "reduce_bucket_size": "auto"}, "reduce_bucket_size: auto needs a model with a hidden_size"),
        ({"stage": 2, "offload_optimizer": {"device": 1}}, "offload_optimizer: must be an object with a device"),
        ([], "zero_optimization must be an object"),
    ],
)
def test_settings_of_deepspeed_that_mean_nothing_are_named(section: object, message: str, tmp_path: Path) -> None:
    """The error has file, setting and what was expected."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    with pytest.raises(PlanError, match=message):
        read_deepspeed(str(path), 2, None)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "AdamW", "params": {"torch_adam": True}}, True),
        ({"type": "AdamW", "params": {"lr": "auto"}}, False),
        ({"type": "AdamW", "params": None}, False),
        (None, False),
        ({"type": "AdamW", "params": {"torch_adam": "yes"}}, None),
        ({"type": "AdamW", "params": []}, False),
        ("AdamW", None),
    ],
)
def test_torch_adam_of_deepspeed_steps_on_lists(optimizer: object, expected: bool | None, tmp_path: Path) -> None:
    """One copy of the master weights is the step's then, in a plan by formula as in a simulated one."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": optimizer}))
    if expected is None:
        with pytest.raises(PlanError, match=r"optimizer\.params\.torch_adam must be true or false"):
            read_deepspeed(str(path), 1, None)
        return
    sharding = read_deepspeed(str(path), 1, None)
    assert sharding.torch_adam is expected
    plan = plan_by_formula(
        PlanRequest(
            parameters=10**6, recipe=find_recipe("bf16-master"), optimizer=find_optimizer("adamw"), sharding=sharding
        )
    )
    assert any("0.004 GB of temporaries" in said for said in plan.assumptions) is expected
    assert step_kernels(Target.CUDA, sharding) is (StepKernels.FOREACH if expected else StepKernels.FUSED)


def test_defaults_of_deepspeed_are_the_defaults_of_a_plan(tmp_path: Path) -> None:
    """An empty section of stage 3 is what --zero 3 plans."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9}}))
    assert read_deepspeed(str(path), 8, 4096) == Sharding(strategy=Strategy.ZERO3, world_size=8)

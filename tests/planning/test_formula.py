"""Plans by formula: the published tables, and what must hold for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.states import OPTIMIZERS, find_optimizer
from memtrace.planning.recipe import RECIPES, find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import ZERO_STAGES, Offload, Sharding, Strategy
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import PERSISTENT, Category, Moment
from memtrace.record.plan import Plan
from memtrace.record.units import GB, GIB

MODEL_STATES = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)


def request(recipe: str = "bf16-master", optimizer: str = "adamw", **fields: Any) -> PlanRequest:
    """A request for 8 billion parameters, by names."""
    wanted: dict[str, Any] = {"parameters": 8 * 10**9, **fields}
    return PlanRequest(recipe=find_recipe(recipe), optimizer=find_optimizer(optimizer), **wanted)


def sharded(strategy: Strategy, ranks: int = 8, **fields: Any) -> Sharding:
    """A sharding by name."""
    return Sharding(strategy=strategy, world_size=ranks, **fields)


def states_at(plan: Plan, moment: Moment) -> int:
    """Bytes of weights, masters, gradients and optimizer states."""
    return sum(plan.moments[moment][category] for category in MODEL_STATES)


def test_the_table_that_the_project_started_from() -> None:
    """Llama-3-8B with bf16, float32 masters and AdamW: 16, 32, 16, 32, 32, 4.8; 132.8 GB or 123.7 GiB."""
    plan = plan_by_formula(request(activation_ratio=0.3))
    assert dict(plan.moments[Moment.PEAK].entries) == {
        EntryKey(Category.WEIGHTS, "trainable", "bfloat16"): 16 * GB,
        EntryKey(Category.MASTER_WEIGHTS, "", "float32"): 32 * GB,
        EntryKey(Category.GRADIENTS, "", "bfloat16"): 16 * GB,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): 32 * GB,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"): 32 * GB,
        EntryKey(Category.ACTIVATIONS, "", "bfloat16"): 4_800_000_000,
    }
    assert plan.total_bytes == 132_800_000_000
    assert round(plan.total_bytes / GIB, 1) == 123.7


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(0, "120"), (1, "31.4"), (2, "16.6"), (3, "1.88")], ids=lambda value: f"ZeRO {value}"
)
def test_the_rows_of_the_zero_paper(stage: int, gigabytes: str) -> None:
    """7.5 billion parameters, K = 12, 64 ranks: figure 1 of the paper, in its digits."""
    plan = plan_by_formula(request(parameters=7_500_000_000, sharding=sharded(ZERO_STAGES[stage], 64)))
    assert f"{states_at(plan, Moment.BACKWARD_END) / GB:.3g}" == gigabytes


def test_megatron_with_its_distributed_optimizer() -> None:
    """Bf16 parameters with fp32 gradients: 18 bytes each, 6 + 12/d over d ranks, as Megatron-LM documents."""
    assert states_at(plan_by_formula(request("megatron")), Moment.PEAK) == 18 * 8 * GB
    plan = plan_by_formula(request("megatron", sharding=sharded(Strategy.ZERO1, 16)))
    assert plan.total_bytes == states_at(plan, Moment.PEAK) == (6 * 16 + 12) * 8 * GB // 16


class TestMoments:
    def test_gradients_come_and_go(self) -> None:
        """They wait at the end of backward, are freed with the step, and are not there at the end of forward."""
        moments = plan_by_formula(request(activation_ratio=0.3)).moments
        assert list(moments) == list(Moment)
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == 16 * GB
        assert moments[Moment.FORWARD_END][Category.GRADIENTS] == moments[Moment.STEP_END][Category.GRADIENTS] == 0

    def test_with_accumulation_the_last_forward_pass_finds_gradients(self) -> None:
        """From the second micro batch on gradients are there in the forward pass."""
        plan = plan_by_formula(request(activation_ratio=0.3, accumulation_steps=4))
        assert plan.moments[Moment.FORWARD_END] == replace(plan.moments[Moment.PEAK], moment=Moment.FORWARD_END)
        assert plan.allocated.low == plan.total_bytes

    def test_activations_and_casts_last_from_forward_to_backward(self) -> None:
        """At the end of the backward pass neither is left."""
        moments = plan_by_formula(request("hf-autocast", activation_ratio=0.3)).moments
        for category, size in ((Category.ACTIVATIONS, 4.8 * GB), (Category.TRANSIENT_WEIGHTS, 16 * GB)):
            assert moments[Moment.FORWARD_END][category] == moments[Moment.PEAK][category] == size
            assert moments[Moment.BACKWARD_END][category] == moments[Moment.STEP_END][category] == 0

    @pytest.mark.parametrize(
        "holds",
        [
            request("megatron"),
            request(activation_ratio=0.3, sharding=sharded(Strategy.ZERO3)),
            request(sharding=sharded(Strategy.DDP, gradient_as_bucket_view=True)),
        ],
        ids=["main gradients", "ZeRO 3", "DDP bucket views"],
    )
    def test_buffers_of_gradients_stay(self, holds: PlanRequest) -> None:
        """Gradients that live in a buffer of the engine are there at every moment."""
        sizes = {found[Category.GRADIENTS] for found in plan_by_formula(holds).moments.values()}
        assert len(sizes) == 1 and sizes != {0}

    def test_without_an_optimizer_nothing_is_trained(self) -> None:
        """No gradients, masters or states, and no end of a backward pass."""
        plan = plan_by_formula(request(optimizer="none", activation_ratio=0.3, sharding=sharded(Strategy.DDP)))
        assert plan.moments[Moment.PEAK].by_category() == {
            Category.WEIGHTS: 16 * GB,
            Category.ACTIVATIONS: 4_800_000_000,
        }
        assert Moment.BACKWARD_END not in plan.moments


class TestEngines:
    def test_ddp_buckets_are_a_second_copy_of_the_gradients(self) -> None:
        """Unless gradients are views of the buckets."""
        copied = plan_by_formula(request(sharding=sharded(Strategy.DDP)))
        viewed = plan_by_formula(request(sharding=sharded(Strategy.DDP, gradient_as_bucket_view=True)))
        assert copied.moments[Moment.STEP_END][Category.COMM_BUFFERS] == 16 * GB
        assert copied.total_bytes - viewed.total_bytes == 16 * GB

    @pytest.mark.parametrize(("overlap", "size"), [(False, GB), (True, 2 * GB)])
    def test_the_reduce_bucket_of_zero(self, overlap: bool, size: int) -> None:
        """5e8 elements in bfloat16, twice with overlap_comm, however small the model; only in the backward pass."""
        small = request(parameters=1000, activation_bytes=0, sharding=sharded(Strategy.ZERO2, overlap_comm=overlap))
        moments = plan_by_formula(small).moments
        assert moments[Moment.PEAK][Category.COMM_BUFFERS] == size
        assert moments[Moment.STEP_END][Category.COMM_BUFFERS] == 0

    @pytest.mark.parametrize("stage", [1, 2])
    def test_the_step_of_zero_has_float32_gradients(self, stage: int) -> None:
        """Without activations the peak is in the step: 16-bit gradients and a float32 copy of this rank's share."""
        peak = plan_by_formula(request(sharding=sharded(ZERO_STAGES[stage], 2))).moments[Moment.PEAK]
        assert peak.entries[EntryKey(Category.GRADIENTS, "", "float32")] == 16 * GB
        assert peak.entries[EntryKey(Category.GRADIENTS, "", "bfloat16")] == 8 * GB
        assert peak[Category.COMM_BUFFERS] == 0

    def test_zero_keeps_masters_whatever_the_recipe(self) -> None:
        """DeepSpeed makes float32 copies for pure bf16, and in stage 2 even of float32 weights, but not in stage 3."""
        for recipe, strategy, size in (
            ("pure-bf16", Strategy.ZERO2, 4 * GB),
            ("fp32", Strategy.ZERO2, 4 * GB),
            ("fp32", Strategy.ZERO3, 0),
            ("pure-bf16", Strategy.ZERO0, 32 * GB),
        ):
            plan = plan_by_formula(request(recipe, sharding=sharded(strategy)))
            assert plan.moments[Moment.STEP_END][Category.MASTER_WEIGHTS] == size, (recipe, strategy)

    def test_zero_3_gathers_up_to_its_limit(self) -> None:
        """A billion gathered elements at most, all of a smaller model."""
        for parameters, size in ((8 * 10**9, 2 * GB), (10**6, 2 * 10**6)):
            plan = plan_by_formula(request(parameters=parameters, activation_bytes=0, sharding=sharded(Strategy.ZERO3)))
            assert plan.moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == size

    @pytest.mark.parametrize("recipe", ["hf-autocast", "bf16-master"])
    def test_fsdp_shards_masters_and_gathers_units(self, recipe: str) -> None:
        """The float32 shards are the masters; a unit is gathered in bfloat16, and nothing is cast besides."""
        plan = plan_by_formula(
            request(recipe, largest_layer_parameters=10**8, activation_bytes=0, sharding=sharded(Strategy.FSDP))
        )
        peak = plan.moments[Moment.PEAK]
        assert peak.by_category() == {
            Category.MASTER_WEIGHTS: 4 * GB,
            Category.GRADIENTS: 4 * GB + 2 * 10**8,
            Category.OPTIMIZER_STATE: 8 * GB,
            Category.TRANSIENT_WEIGHTS: 2 * 10**8,
            Category.COMM_BUFFERS: 4 * 10**8,
        }

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_offloading_the_optimizer(self, stage: int) -> None:
        """Masters, states and gradients leave the device; DeepSpeed keeps all of them in float32 on the host."""
        plan = plan_by_formula(
            request(activation_bytes=0, sharding=sharded(ZERO_STAGES[stage], offload=Offload.OPTIMIZER))
        )
        weights = 2 * GB if stage == 3 else 16 * GB
        assert states_at(plan, Moment.PEAK) == plan.moments[Moment.PEAK][Category.WEIGHTS] == weights
        assert plan.host_bytes == (4 + 8 + 4) * GB

    @pytest.mark.parametrize(("strategy", "host"), [(Strategy.ZERO3, 18 * GB), (Strategy.FSDP, 16 * GB)])
    def test_offloading_parameters(self, strategy: Strategy, host: int) -> None:
        """Nothing lasting but buckets is left on the device."""
        plan = plan_by_formula(request(activation_bytes=0, sharding=sharded(strategy, offload=Offload.PARAMETERS)))
        assert not states_at(plan, Moment.STEP_END)
        assert plan.host_bytes == host


class TestRange:
    def test_unknown_activations_have_no_upper_end(self) -> None:
        """A plan without activations says what is needed at least, and nothing more."""
        plan = plan_by_formula(request())
        assert plan.allocated.high is None
        assert plan.allocated.low == plan.total_bytes
        assert "Activations are not counted: no ratio and no bytes were given." in plan.assumptions

    def test_the_foreach_step_is_in_the_upper_end(self) -> None:
        """Torch's default step holds a copy of the updated parameters: 32 GB more than at the end of backward."""
        plan = plan_by_formula(request(activation_ratio=0.3))
        assert plan.allocated.high == (128 + 32) * GB
        assert plan.allocated.low == 128 * GB

    def test_activations_in_bytes(self) -> None:
        """They can be given as a size instead of a ratio."""
        assert plan_by_formula(request(activation_bytes=6 * GIB)).total_bytes == 128 * GB + 6 * GIB


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: request(parameters=0), r"parameters must be 1\.\."),
        (lambda: request(parameters=10**16), r"parameters must be 1\.\."),
        (lambda: request(trainable_parameters=9 * 10**9), "trainable parameters must be"),
        (lambda: request(activation_ratio=float("nan")), "activation ratio"),
        (lambda: request(activation_ratio=0.3, activation_bytes=1), "one of them is enough"),
        (lambda: request(activation_bytes=-1), "activation bytes"),
        (lambda: request(accumulation_steps=0), "accumulation steps"),
        (lambda: request(layers=0), "layers"),
        (lambda: request(largest_layer_parameters=9 * 10**9), "largest layer"),
        (lambda: request("megatron", sharding=sharded(Strategy.ZERO2)), "distributed optimizer, which is ZeRO 1"),
        (lambda: Sharding(world_size=8), "DDP, FSDP or a ZeRO stage"),
        (lambda: sharded(Strategy.DDP, 0), "world size must be"),
        (lambda: sharded(Strategy.DDP, offload=Offload.OPTIMIZER), "needs ZeRO 1, 2 or 3"),
        (lambda: sharded(Strategy.ZERO2, offload=Offload.PARAMETERS), "needs ZeRO 3 or FSDP"),
    ],
)
def test_what_cannot_be_planned_is_named(wrong: Any, said: str) -> None:
    """Every mistake is a PlanError that says which figure, what was expected, and what it got."""
    with pytest.raises(PlanError, match=said):
        wrong()


REQUESTS = st.fixed_dictionaries(
    {
        "parameters": st.integers(1, 10**13),
        "recipe": st.sampled_from(list(RECIPES.values())),
        "optimizer": st.sampled_from(list(OPTIMIZERS.values())),
        "activation_ratio": st.one_of(st.none(), st.floats(0, 10)),
        "accumulation_steps": st.integers(1, 4),
        "layers": st.integers(1, 200),
    }
)
SHARDINGS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(list(Strategy)),
        "world_size": st.integers(1, 1024),
        "offload": st.sampled_from(list(Offload)),
        "overlap_comm": st.booleans(),
        "gradient_as_bucket_view": st.booleans(),
    }
)


@given(fields=REQUESTS, options=SHARDINGS)
@example(
    fields={
        "parameters": 1,
        "recipe": RECIPES["fp32"],
        "optimizer": OPTIMIZERS["paged_adamw_32bit"],
        "activation_ratio": None,
        "accumulation_steps": 1,
        "layers": 1,
    },
    options={"strategy": Strategy.NONE, "world_size": 1, "offload": Offload.NONE},
)
def test_every_request_is_planned_or_refused(fields: dict[str, Any], options: dict[str, Any]) -> None:
    """No moment is above the peak, what lasts is lasting, the range is one, and nothing else is raised."""
    try:
        asked = PlanRequest(sharding=Sharding(**options), **fields)
    except PlanError:
        return
    plan = plan_by_formula(asked)
    assert all(found.total_bytes <= plan.total_bytes for found in plan.moments.values())
    assert all(size > 0 for found in plan.moments.values() for size in found.entries.values())
    assert {key.category for key in plan.moments[Moment.STEP_END].entries} <= PERSISTENT
    assert plan.allocated.low <= plan.total_bytes
    assert plan.allocated.high is None or plan.allocated.high >= plan.total_bytes
    on_host = asked.sharding.offload is not Offload.NONE or asked.optimizer.paged
    assert on_host or plan.host_bytes == 0
    assert all(sentence.endswith(".") for sentence in plan.assumptions)


@given(parameters=st.integers(10**6, 10**12), ranks=st.integers(2, 512))
def test_each_stage_holds_less_of_the_model(parameters: int, ranks: int) -> None:
    """From stage to stage each rank keeps fewer bytes of model states."""
    held = [
        states_at(plan_by_formula(request(parameters=parameters, sharding=sharded(stage, ranks))), Moment.BACKWARD_END)
        for stage in ZERO_STAGES
    ]
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held)

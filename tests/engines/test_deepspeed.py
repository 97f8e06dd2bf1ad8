"""DeepSpeed ZeRO 0 to 3 with bf16 weights and fp32 masters, two ranks, gradient accumulation 2, from birth."""

from __future__ import annotations

import math
from typing import Any

import pytest
from entries import assert_counted_as_traced, sum_of, total, traced
from planned import HEADER, plan_of_rank, plan_rows
from tables import check_table, per_parameter

from memtrace.planning.sharding.shares import Offload, Strategy, Zero3Settings
from memtrace.record.categories import Moment

OFFLOADED = ("zero-2-offload", "zero-3-offload")
STAGES = (
    *("zero-0", "zero-1", "zero-2", "zero-2-overlap", "zero-3", "zero-3-overlap", "zero-3-persistent"),
    *OFFLOADED,
)
LORA = ("zero-2-lora", "zero-3-lora")
ONE_BUCKET = "zero-2-one-bucket"
RANKS = 2
BUCKET_BYTES = 2 * 20_000


@pytest.fixture(scope="module")
def runs(launch) -> list[dict[str, Any]]:
    return launch("zero.py", VARIANTS=",".join([LORA[0], *STAGES, ONE_BUCKET, "zero-3-streaming", LORA[1]]))


def padded(numels: list[int], stage: str) -> int:
    """Elements of all parameters as the stage pads them, over all ranks.

    ZeRO 1 and 2 pad the flat buffer to two elements (4 bytes of bf16) a rank; ZeRO 3 pads each parameter to the ranks.
    """
    if stage.startswith("zero-3"):
        return sum(RANKS * math.ceil(numel / RANKS) for numel in numels)
    if stage == "zero-0":
        return sum(numels)
    return 2 * RANKS * math.ceil(sum(numels) / (2 * RANKS))


@pytest.mark.parametrize("stage", [*STAGES, *LORA, ONE_BUCKET])
@pytest.mark.parametrize("rank", range(RANKS))
def test_categories_add_up(runs, stage, rank):
    """On every traced step and moment the categories are what was allocated, byte for byte."""
    steps = list(traced(runs[rank][stage]))
    assert len(steps) == 2
    for step in steps:
        assert {"forward_end", "backward_end", "step_end", "peak"} == set(step["moments"])
        for moment in step["moments"].values():
            assert sum_of(moment) == moment["allocated_bytes"]


@pytest.mark.parametrize("stage", [*STAGES, ONE_BUCKET])
@pytest.mark.parametrize("rank", range(RANKS))
def test_counted_steps_end_as_traced_ones(runs, rank, stage):
    """With all that outlives a step, buckets and the gradients that offload keeps among it, to the byte."""
    assert_counted_as_traced(runs[rank][stage])


@pytest.mark.parametrize("rank", range(RANKS))
def test_one_bucket_for_all_gradients(runs, rank):
    """A model smaller than the bucket, as with DeepSpeed's own sizes: what is reduced after the backward pass of the
    micro batch before is a gradient, and the bucket is there from the first gradient on; neither outlives the step."""
    run = runs[rank][ONE_BUCKET]
    reduced = 2 * sum(in_partition(run["numels"], rank))
    for step in traced(run):
        moments = step["moments"]
        for moment in ("forward_end", "backward_end"):
            assert total(moments[moment], "gradients", None, "bfloat16") == reduced
        assert total(moments["forward_end"], "comm_buffers") == 0
        assert total(moments["backward_end"], "comm_buffers", "reduce") == 2 * 500_000
        for category in ("gradients", "comm_buffers"):
            assert total(moments["step_end"], category) == 0


@pytest.mark.parametrize("stage", [*STAGES, *LORA, ONE_BUCKET])
@pytest.mark.parametrize("rank", range(RANKS))
def test_training_is_the_same(runs, stage, rank):
    """Losses and final weights are those of the run without memtrace."""
    run = runs[rank][stage]
    assert run["losses"] == run["plain_losses"]
    assert run["same_weights"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_persistent_categories_have_their_closed_form(runs, stage, rank):
    """Weights are sharded from stage 3 on, masters and optimizer state from stage 1 on; the rest is padding."""
    run = runs[rank][stage]
    elements = padded(run["numels"], stage)
    weights = elements // RANKS if stage.startswith("zero-3") else elements
    state = elements if stage == "zero-0" else elements // RANKS
    for step in traced(run):
        for moment in step["moments"].values():
            assert total(moment, "weights", "trainable", "bfloat16") == 2 * weights
            assert total(moment, "master_weights", "", "float32") == 4 * state
            assert total(moment, "optimizer_state", "exp_avg", "float32") == 4 * state
            assert total(moment, "optimizer_state", "exp_avg_sq", "float32") == 4 * state


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_gradients_have_their_closed_form(runs, stage, rank):
    """At the end of the backward pass: whole in stages 0 and 1, this rank's partition in stages 2 and 3.

    ZeRO-2 keeps each gradient that lies in its partition, or in a part of it, whole; with accumulation once for the
    sum so far and once for the micro batch that just ended. Offloaded, the sum so far is the float32 one on the host.
    """
    run = runs[rank][stage]
    elements = sum(run["numels"])
    for step in traced(run):
        gradients = total(step["moments"]["backward_end"], "gradients", None, "bfloat16")
        if stage in ("zero-0", "zero-1"):
            assert gradients == 2 * elements
        elif stage.startswith("zero-2"):
            assert gradients == (1 if stage in OFFLOADED else 2) * 2 * sum(in_partition(run["numels"], rank))
        else:
            assert gradients == 2 * padded(run["numels"], stage) // RANKS


def in_partition(numels: list[int], rank: int) -> list[int]:
    """Elements of the parameters of which a part lies in this rank's half of the flat buffer."""
    size = padded(numels, "zero-2") // RANKS
    begin, found = 0, []
    for numel in numels:
        if begin < (rank + 1) * size and begin + numel > rank * size:
            found.append(numel)
        begin += numel
    return found


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_optimizer_sees_a_float32_partition(runs, stage):
    """Right before the inner optimizer steps, ZeRO 1 and up hold this rank's gradients in float32, once."""
    for run in (rank[stage] for rank in runs):
        size = 4 * padded(run["numels"], stage) // RANKS
        found = {total(m, "gradients", None, "float32") for s in traced(run) for m in s["moments"].values()}
        assert found <= {0, size}


@pytest.mark.parametrize(("stage", "buckets"), [("zero-1", 1), ("zero-2", 1), ("zero-2-overlap", 2), ("zero-3", 1)])
def test_the_reduction_has_its_buckets(runs, stage, buckets):
    """During the backward pass there is one bucket of the configured size, two where reduction overlaps."""
    for run in (rank[stage] for rank in runs):
        for step in traced(run):
            assert total(step["moments"]["backward_end"], "comm_buffers", "reduce") == buckets * BUCKET_BYTES


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_host_has_its_closed_form(runs, rank):
    """DeepSpeed's accelerator is the CPU here, so that what it offloads to the host is on the device, and is seen.

    The partition's gradients are in float32 from the backward pass on. ZeRO-2 stages its bf16 partition on the host,
    and has two buffers of the size of its largest parameter, one on the host and one on the device.
    """
    for stage in OFFLOADED:
        run = runs[rank][stage]
        partition = padded(run["numels"], stage) // RANKS
        for step in traced(run):
            assert total(step["moments"]["backward_end"], "gradients", None, "float32") == 4 * partition
    run = runs[rank]["zero-2-offload"]
    partition_bytes = 2 * padded(run["numels"], "zero-2-offload") // RANKS
    for step in traced(run):
        staging = total(step["moments"]["step_end"], "comm_buffers", "offload", "bfloat16")
        assert staging == partition_bytes + 2 * 2 * max(run["numels"])


def test_small_parameters_that_zero_3_keeps_gathered_are_weights(runs):
    """Parameters below the persistence threshold stay whole between steps, beside their shards."""
    for run in (rank["zero-3-persistent"] for rank in runs):
        kept = [RANKS * math.ceil(numel / RANKS) for numel in run["numels"] if numel < 100]
        for step in traced(run):
            assert total(step["moments"]["step_end"], "weights", "gathered") == 2 * sum(kept)


@pytest.mark.parametrize("stage", [*STAGES, *LORA, ONE_BUCKET])
def test_hardly_anything_is_unattributed(runs, stage):
    """At the peak at most 1 % is claimed by nobody: the loss that the loop keeps, and scalars of the engine.

    Without ZeRO, DeepSpeed reduces a copy of all gradients, which gloo gives back when its thread comes to it: on a
    busy machine that is after the step has gone on.
    """
    for run in (rank[stage] for rank in runs):
        late = 2 * sum(run["numels"]) if stage == "zero-0" else 0
        for step in traced(run):
            peak = step["moments"]["peak"]
            assert total(peak, "unattributed") - late <= 0.01 * peak["allocated_bytes"]


@pytest.fixture(scope="module")
def one_rank(launch) -> dict[str, Any]:
    return launch("zero.py", processes=1, VARIANTS="zero-0,zero-1,zero-2")[0]


@pytest.mark.parametrize("stage", ["zero-0", "zero-1"])
def test_one_rank_has_the_sixteen_bytes(one_rank, stage):
    """Weights 2, masters 4, gradients 2, exp_avg 4 and exp_avg_sq 4 bytes a parameter, but for one of padding."""
    run = one_rank[stage]
    parameters = sum(run["numels"])
    proportions = {
        ("weights", "trainable"): 2,
        ("master_weights", ""): 4,
        ("gradients", ""): 2,
        ("optimizer_state", "exp_avg"): 4,
        ("optimizer_state", "exp_avg_sq"): 4,
    }
    for step in traced(run):
        moment = step["moments"]["backward_end"]
        for (category, component), width in proportions.items():
            assert total(moment, category, component) - width * parameters in (0, width)


def test_zero_2_on_one_rank_holds_the_gradients_twice_while_it_accumulates(one_rank):
    """The sum of the micro batches so far and the micro batch that just ended, both whole in bf16."""
    run = one_rank["zero-2"]
    for step in traced(run):
        assert total(step["moments"]["backward_end"], "gradients") == 2 * 2 * sum(run["numels"])


def test_the_page_has_the_measured_bytes(runs):
    """docs/engines.md shows rank 0 beside the ZeRO paper's figures and DeepSpeed's own estimator."""
    rows = []
    for stage in ("zero-0", "zero-1", "zero-2", "zero-3"):
        run = runs[0][stage]
        parameters = sum(run["numels"])
        moment = next(traced(run))["moments"]["backward_end"]
        parts = [total(moment, name) for name in ("weights", "master_weights", "gradients", "optimizer_state")]
        estimate = run["estimate"]
        rows.append(
            [
                stage.replace("zero-", "ZeRO-"),
                *(per_parameter(part, parameters) for part in [*parts, sum(parts)]),
                PAPER[stage],
                "-" if estimate is None else per_parameter(estimate, parameters),
            ]
        )
    header = ["", "weights", "masters", "gradients", "optimizer state", "sum", "ZeRO paper", "DeepSpeed's estimator"]
    check_table("deepspeed", header, rows)


PAPER = {"zero-0": "16.00", "zero-1": "10.00", "zero-2": "9.00", "zero-3": "8.00"}
"""2 + 2 + 12, of which each stage divides more by two ranks (Rajbhandari et al., 2020, figure 1)."""


def test_simulated_plans_are_what_each_rank_measured(runs):
    """Persistent categories to the byte on both ranks, the peak within 5 %; docs/engines.md shows the errors."""
    check_table("deepspeed plans", HEADER, plan_rows(runs, PLANS), exact=False)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("zero-2-offload", {"strategy": Strategy.ZERO2, "offload": Offload.OPTIMIZER}),
        (
            "zero-3-offload",
            {
                "strategy": Strategy.ZERO3,
                "offload": Offload.PARAMETERS,
                "zero3": Zero3Settings(persistence_threshold=0),
            },
        ),
    ],
)
@pytest.mark.parametrize("rank", range(RANKS))
def test_offloaded_plans_are_what_each_rank_measured(runs, variant, settings, rank):
    """Device and host together are what is measured where the device is a CPU: between steps but for a norm and a step
    count, at the peak within 5 %. What the plan leaves on the device is there in the run."""
    made = plan_of_rank(rank, "bf16-master", {"reduce_bucket": 20_000, **settings})
    measured = next(traced(runs[rank][variant]))["moments"]
    for moment, most in ((Moment.STEP_END, 16), (Moment.PEAK, 0.05 * measured["peak"]["allocated_bytes"])):
        both = made.moments[moment].total_bytes + made.host_bytes
        assert abs(both - measured[moment]["allocated_bytes"]) <= most
    for key, size in made.moments[Moment.STEP_END].entries.items():
        assert size <= total(measured["step_end"], *key) + 2


PLANS = {
    "zero-0": ("ZeRO-0", "bf16-master", {"strategy": Strategy.ZERO0, "reduce_bucket": 20_000}),
    "zero-1": ("ZeRO-1", "bf16-master", {"strategy": Strategy.ZERO1, "reduce_bucket": 20_000}),
    "zero-2": ("ZeRO-2", "bf16-master", {"strategy": Strategy.ZERO2, "reduce_bucket": 20_000}),
    "zero-3-lora": (
        "ZeRO-3, LoRA",
        "bf16-master",
        {
            "strategy": Strategy.ZERO3,
            "reduce_bucket": 20_000,
            "build": "build_lora",
            "zero3": Zero3Settings(persistence_threshold=0),
        },
    ),
    "zero-2-overlap": (
        "ZeRO-2, `overlap_comm`",
        "bf16-master",
        {"strategy": Strategy.ZERO2, "reduce_bucket": 20_000, "overlap_comm": True},
    ),
    "zero-3": (
        "ZeRO-3",
        "bf16-master",
        {
            "strategy": Strategy.ZERO3,
            "reduce_bucket": 20_000,
            "zero3": Zero3Settings(persistence_threshold=0),
        },
    ),
    "zero-3-persistent": (
        "ZeRO-3, `stage3_param_persistence_threshold` 100",
        "bf16-master",
        {
            "strategy": Strategy.ZERO3,
            "reduce_bucket": 20_000,
            "zero3": Zero3Settings(persistence_threshold=100),
        },
    ),
    "zero-3-streaming": (
        "ZeRO-3 that gathers 5,000 elements ahead, keeps 20,000, updates 10,000 at a time",
        "bf16-master",
        {
            "strategy": Strategy.ZERO3,
            "reduce_bucket": 20_000,
            "zero3": Zero3Settings(
                persistence_threshold=50, prefetch_bucket=5_000, max_live=20_000, max_reuse=5_000, sub_group=10_000
            ),
        },
    ),
}
"""Label, recipe and settings of the simulated plan of each variant."""


@pytest.mark.long
def test_a_base_in_4_bits(launch):
    """Packed weights are frozen: whole in stage 2, in stage 3 each rank's shard; their scales are whole on each rank.

    What the loop's loss keeps of gathered weights is gathered weights; the end of a step has it, too."""
    packed, scales = 3 * (4 * 48 * 48 + 2 * 48 * 96) // 2, 18 * 4 * (16 + 256 + 1 + 1)
    for report in launch("zero.py", VARIANTS="zero-2-qlora,zero-3-qlora"):
        for name, ranks in (("zero-2-qlora", 1), ("zero-3-qlora", RANKS)):
            run = report[name]
            assert run["losses"] == run["plain_losses"]
            assert run["same_weights"]
            assert len(list(traced(run))) == 2
            for step in traced(run):
                for moment in step["moments"].values():
                    assert sum_of(moment) == moment["allocated_bytes"]
                    assert total(moment, "weights", "frozen", "uint8") == packed // ranks + 2 * packed // 64
                    assert total(moment, "weights", "frozen", "float32") == scales
                    assert total(moment, "unattributed") <= 0.01 * moment["allocated_bytes"]
                assert total(step["moments"]["step_end"], "master_weights") == 4 * 2452 // 2

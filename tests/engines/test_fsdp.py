"""FSDP2 on two ranks, from birth: float32 and bf16 to compute, resharded after the forward pass and not."""

from __future__ import annotations

import math

import pytest
from entries import assert_counted_as_traced, assert_law_1, assert_trained_alike, total, traced
from planned import HEADER, plan_rows
from tables import check_table, per_parameter

from memtrace.planning.sharding.shares import Strategy

VARIANTS = ("fsdp", "fsdp-keep", "fsdp-bf16", "fsdp-bf16-keep", "fsdp-bf16-offload")
RANKS = 2
pytestmark = pytest.mark.xdist_group("torch-engines")


def sharded(shapes: list[list[int]], rank: int | None = None) -> int:
    """Elements of this rank's shards: whole rows; for `rank` None with the padding to the same number on each rank."""
    elements = 0
    for rows, *rest in shapes:
        most = math.ceil(rows / RANKS)
        own = most if rank is None else min(most, rows - rank * most)
        elements += own * math.prod(rest)
    return elements


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_categories_add_up(torch_engines, variant, rank):
    """On every traced step and moment the categories are what was allocated, byte for byte."""
    assert_law_1(torch_engines[rank][variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_counted_steps_end_as_traced_ones(torch_engines, rank, variant):
    """With all that outlives a step, the buckets among it, to the byte."""
    assert_counted_as_traced(torch_engines[rank][variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_training_is_the_same(torch_engines, variant, rank):
    """Losses and final shards are those of the run without memtrace; the engine was found."""
    assert_trained_alike(torch_engines[rank][variant], "FSDP2")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_shards_have_their_closed_form(torch_engines, variant, rank):
    """Shards are masters where bf16 computes and weights where float32 does; state is that of the unpadded rows."""
    run = torch_engines[rank][variant]
    held, other = ("master_weights", "weights") if "bf16" in variant else ("weights", "master_weights")
    for step in traced(run):
        for moment in step["moments"].values():
            assert total(moment, held, None, "float32") == 4 * sharded(run["shapes"])
            assert total(moment, other) == 0
            assert total(moment, "optimizer_state", "exp_avg") == 4 * sharded(run["shapes"], rank)
            assert total(moment, "optimizer_state", "exp_avg_sq") == 4 * sharded(run["shapes"], rank)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_reduced_gradients_have_their_closed_form(torch_engines, variant, rank):
    """After the backward pass this rank has the gradients of its shards in float32, padded like them."""
    run = torch_engines[rank][variant]
    for step in traced(run):
        moment = step["moments"]["backward_end"]
        assert total(moment, "gradients", "", "float32") == 4 * sharded(run["shapes"])


@pytest.mark.parametrize("variant", ["fsdp-keep", "fsdp-bf16-keep"])
def test_without_resharding_all_weights_are_gathered_after_the_forward_pass(torch_engines, variant):
    """They are transient, whole, padded, and in the precision that computes; after the step they are gone."""
    kind, width = ("bfloat16", 2) if "bf16" in variant else ("float32", 4)
    for run in (rank[variant] for rank in torch_engines):
        for step in traced(run):
            gathered = total(step["moments"]["forward_end"], "transient_weights", "all_gather", kind)
            assert gathered == RANKS * width * sharded(run["shapes"])
            assert total(step["moments"]["step_end"], "transient_weights") == 0


@pytest.mark.parametrize(("variant", "width"), [("fsdp", 4), ("fsdp-bf16", 2)])
def test_with_resharding_only_the_root_is_gathered_after_the_forward_pass(torch_engines, variant, width):
    """The layers' copies are freed after each layer; FSDP keeps those of the root module for the backward pass."""
    for run in (rank[variant] for rank in torch_engines):
        layers = [shape for shape, name in zip(run["shapes"], run["names"], strict=True) if "encoder.layer" in name]
        root = sharded(run["shapes"]) - sharded(layers)
        for step in traced(run):
            assert total(step["moments"]["forward_end"], "transient_weights") == RANKS * width * root


@pytest.mark.parametrize("variant", VARIANTS)
def test_hardly_anything_is_unattributed(torch_engines, variant):
    """At the peak at most 1 % is claimed by nobody: the loss that the loop keeps."""
    for run in (rank[variant] for rank in torch_engines):
        for step in traced(run):
            peak = step["moments"]["peak"]
            assert total(peak, "unattributed") <= 0.01 * peak["allocated_bytes"]


@pytest.mark.parametrize("rank", range(RANKS))
def test_gradients_that_are_dropped_inside_the_backward_pass(torch_engines, rank):
    """One optimizer for each parameter: law 1, training as without memtrace, and the gradients of the group whose turn
    it is: the root's at the end, beside three numbers of a whole one. None when the step is over; counted steps end
    alike."""
    run = torch_engines[rank]["fsdp-in-backward"]
    assert_law_1(run)
    assert_trained_alike(run, "FSDP2")
    assert_counted_as_traced(run)
    root = [shape for shape, name in zip(run["shapes"], run["names"], strict=True) if "encoder.layer" not in name]
    for step in traced(run):
        moments = step["moments"]
        assert total(moments["backward_end"], "gradients", "", "float32") - 4 * sharded(root) in (0, 3 * 4)
        assert total(moments["step_end"], "gradients") == 0
        assert total(moments["step_end"], "optimizer_state", "exp_avg") == 4 * sharded(run["shapes"], rank)
        assert total(moments["peak"], "unattributed") <= 0.01 * moments["peak"]["allocated_bytes"]


@pytest.mark.parametrize("variant", ["ddp", "ddp-view", "fsdp", "fsdp-bf16"])
def test_an_update_that_is_left_out_ends_its_step(torch_engines, variant):
    """Six steps, of which the loop drops the gradients of three: each is a step of its own on every rank."""
    assert [rank[variant]["steps_counted"] for rank in torch_engines] == [6] * RANKS


def test_the_page_has_the_measured_bytes(torch_engines):
    """docs/engines.md shows rank 0."""
    names = {
        "fsdp": "float32, reshard",
        "fsdp-keep": "float32, keep",
        "fsdp-bf16": "bf16, reshard",
        "fsdp-bf16-keep": "bf16, keep",
    }
    rows = []
    for variant, label in names.items():
        run = torch_engines[0][variant]
        moments = next(traced(run))["moments"]
        parts = [
            total(moments["backward_end"], name)
            for name in ("weights", "master_weights", "gradients", "optimizer_state")
        ]
        parts.append(total(moments["forward_end"], "transient_weights"))
        rows.append([label, *(per_parameter(part, sum(run["numels"])) for part in parts)])
    check_table("fsdp", ["", "weights", "masters", "gradients", "optimizer state", "gathered copies"], rows)


@pytest.mark.needs("FSDP2 that runs without a GPU")
def test_simulated_plans_are_what_each_rank_measured(torch_engines):
    """Persistent categories to the byte on both ranks, the peak within 5 %; docs/engines.md shows the errors."""
    check_table("fsdp plans", HEADER, plan_rows(torch_engines, PLANS), exact=False)


PLANS = {
    "fsdp": ("float32, reshard", "fp32", {"strategy": Strategy.FSDP}),
    "fsdp-keep": ("float32, keep", "fp32", {"strategy": Strategy.FSDP, "reshard_after_forward": False}),
    "fsdp-bf16": ("bf16, reshard", "bf16-master", {"strategy": Strategy.FSDP}),
    "fsdp-bf16-keep": ("bf16, keep", "bf16-master", {"strategy": Strategy.FSDP, "reshard_after_forward": False}),
}
"""Label, recipe and settings of the simulated plan of each variant."""

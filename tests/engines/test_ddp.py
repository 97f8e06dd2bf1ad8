"""DistributedDataParallel on two ranks, from birth, with `no_sync` for all micro batches but the last."""

from __future__ import annotations

import pytest
from entries import assert_counted_as_traced, assert_law_1, assert_trained_alike, total, traced
from planned import HEADER, plan_rows
from tables import check_table, per_parameter

from memtrace.planning.sharding.shares import Strategy

VARIANTS = ("ddp", "ddp-view")
RANKS = 2
pytestmark = pytest.mark.xdist_group("torch-engines")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_categories_add_up(torch_engines, variant, rank):
    """On every traced step and moment the categories are what was allocated, byte for byte."""
    assert_law_1(torch_engines[rank][variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_training_is_the_same(torch_engines, variant, rank):
    """Losses and final weights are those of the run without memtrace; the engine was found."""
    assert_trained_alike(torch_engines[rank][variant], "DDP")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_everything_is_whole_on_each_rank(torch_engines, variant, rank):
    """Weights, gradients and both moments have four bytes a parameter; nothing is padded."""
    run = torch_engines[rank][variant]
    size = 4 * sum(run["numels"])
    for step in traced(run):
        moment = step["moments"]["backward_end"]
        assert total(moment, "weights") == size
        assert total(moment, "gradients") == size
        assert total(moment, "optimizer_state", "exp_avg") == size
        assert total(moment, "optimizer_state", "exp_avg_sq") == size


@pytest.mark.parametrize("rank", range(RANKS))
def test_buckets_are_a_second_copy_of_the_gradients(torch_engines, rank):
    """In the step in which the reducer rebuilds its buckets, and in a later one whose window opened after that."""
    run = torch_engines[rank]["ddp"]
    for step in traced(run):
        for moment in ("backward_end", "step_end", "peak"):
            assert total(step["moments"][moment], "comm_buffers", "bucket", "float32") == 4 * sum(run["numels"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_counted_steps_have_the_buckets_too(torch_engines, variant, rank):
    """To the byte, as traced ones have them at their end, with all else that outlives a step. Where gradients are views
    of buckets, these stay as gradients when the loop has dropped them."""
    run = torch_engines[rank][variant]
    end = assert_counted_as_traced(run)
    kept = "comm_buffers" if variant == "ddp" else "gradients"
    buckets = {category: size for (category, *_), size in end.items() if category in ("comm_buffers", "gradients")}
    assert buckets == {kept: 4 * sum(run["numels"])}


@pytest.mark.parametrize("rank", range(RANKS))
def test_gradients_that_are_views_need_no_buckets(torch_engines, rank):
    """With `gradient_as_bucket_view` the bucket is the gradient."""
    for step in traced(torch_engines[rank]["ddp-view"]):
        for moment in step["moments"].values():
            assert total(moment, "comm_buffers") == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_hardly_anything_is_unattributed(torch_engines, variant):
    """At the peak at most 1 % is claimed by nobody: the loss that the loop keeps."""
    for run in (rank[variant] for rank in torch_engines):
        for step in traced(run):
            peak = step["moments"]["peak"]
            assert total(peak, "unattributed") <= 0.01 * peak["allocated_bytes"]


def test_the_page_has_the_measured_bytes(torch_engines):
    """docs/engines.md shows rank 0."""
    rows = []
    for variant, label in (("ddp", "default"), ("ddp-view", "`gradient_as_bucket_view`")):
        run = torch_engines[0][variant]
        moment = list(traced(run))[-1]["moments"]["backward_end"]
        parts = [total(moment, name) for name in ("weights", "gradients", "optimizer_state", "comm_buffers")]
        rows.append([label, *(per_parameter(part, sum(run["numels"])) for part in parts)])
    check_table("ddp", ["", "weights", "gradients", "optimizer state", "comm_buffers"], rows)


def test_simulated_plans_are_what_each_rank_measured(torch_engines):
    """Persistent categories to the byte on both ranks, the peak within 5 %; docs/engines.md shows the errors."""
    check_table("ddp plans", HEADER, plan_rows(torch_engines, PLANS), exact=False)


PLANS = {
    "ddp": ("default", "fp32", {"strategy": Strategy.DDP}),
    "ddp-view": ("`gradient_as_bucket_view`", "fp32", {"strategy": Strategy.DDP, "gradient_as_bucket_view": True}),
}
"""Label, recipe and settings of the simulated plan of each variant."""

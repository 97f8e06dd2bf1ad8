"""FSDP1 on two ranks, from birth: float32 and bf16 to compute, flat parameters listed and views of them."""

from __future__ import annotations

from typing import Any

import pytest
from entries import assert_law_1, assert_trained_alike, total, traced
from tables import check_table, per_parameter

VARIANTS = ("fsdp1", "fsdp1-bf16", "fsdp1-bf16-keep")
RANKS = 2
BOTH = ("rank", range(RANKS))
pytestmark = pytest.mark.xdist_group("torch-engines")


def shards(run: dict[str, Any]) -> int:
    """Elements of one rank's shards: the model has an odd number of parameters, of which the last shard is padded."""
    return (sum(run["numels"]) + 1) // RANKS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(*BOTH)
def test_categories_add_up_and_training_is_the_same(torch_engines, variant, rank):
    """Law 1 from birth at each moment of each traced step; losses and weights are those of the run without memtrace."""
    run = torch_engines[rank][variant]
    assert_law_1(run)
    assert_trained_alike(run, "FSDP1")
    for step in traced(run):
        peak = step["moments"]["peak"]
        assert total(peak, "unattributed") <= 0.01 * peak["allocated_bytes"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(*BOTH)
def test_shards_have_their_closed_form(torch_engines, variant, rank):
    """Shards are masters where bf16 computes and weights where float32 does; state and reduced gradients are theirs."""
    run = torch_engines[rank][variant]
    held, other = ("master_weights", "weights") if "bf16" in variant else ("weights", "master_weights")
    views = variant == "fsdp1-bf16"  # the last rank's end before the padding
    unpadded = RANKS * shards(run) - sum(run["numels"]) if views and rank == RANKS - 1 else 0
    for record in run["records"]:  # counted ones too
        moment = record["moments"]["step_end"]
        assert total(moment, held, None, "float32") == 4 * shards(run)
        assert total(moment, other) == 0
        assert total(moment, "optimizer_state", "exp_avg") == 4 * (shards(run) - unpadded)
    for record in traced(run):
        assert total(record["moments"]["backward_end"], "gradients", "", "float32") == 4 * shards(run)


def test_what_is_gathered_is_transient(torch_engines):
    """All of it after the forward pass where it is not resharded, in the precision that computes; none after a step."""
    for run in (rank["fsdp1-bf16-keep"] for rank in torch_engines):
        for step in traced(run):
            gathered = total(step["moments"]["forward_end"], "transient_weights", "all_gather", "bfloat16")
            assert gathered == RANKS * 2 * shards(run)
            assert total(step["moments"]["step_end"], "transient_weights") == 0


def test_the_page_has_the_measured_bytes(torch_engines):
    """docs/engines.md shows rank 0."""
    names = {"fsdp1": "float32", "fsdp1-bf16": "bf16, `use_orig_params`", "fsdp1-bf16-keep": "bf16, SHARD_GRAD_OP"}
    rows = []
    for variant, label in names.items():
        run = torch_engines[0][variant]
        moments = next(traced(run))["moments"]
        names_of_parts = ("weights", "master_weights", "gradients", "optimizer_state")
        parts = [total(moments["backward_end"], name) for name in names_of_parts]
        parts.append(total(moments["forward_end"], "transient_weights"))
        rows.append([label, *(per_parameter(part, sum(run["numels"])) for part in parts)])
    check_table("fsdp1", ["", "weights", "masters", "gradients", "optimizer state", "gathered copies"], rows)

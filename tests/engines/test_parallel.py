"""Tensors, rows, stages, optimizer state and gradients split over two ranks by torch itself, traced from birth."""

from __future__ import annotations

from typing import Any

import pytest
from entries import assert_law_1, total, traced

WIDTH, ROWS, RANKS = 128, 4, 2
MATRICES = 4 * 2 * WIDTH * 4 * WIDTH
VECTORS = 4 * (2 * WIDTH + 4 * WIDTH + WIDTH)
"""Bytes of a norm with two vectors and of the biases of two layers."""
WHOLE = MATRICES + VECTORS
SPLIT = MATRICES // RANKS + VECTORS - 4 * 4 * WIDTH // RANKS
WEIGHTS = {"tensors": SPLIT, "sequence": SPLIT, "stages": WHOLE, "state": 2 * WHOLE, "compressed": WHOLE}
STATE = {**WEIGHTS, "state": WHOLE}
KEPT = {"stages": 4 * ROWS * WIDTH}
"""Bytes that outlive a step: the outputs of the last stage, which torch keeps until the next one."""
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def parallel(launch) -> list[dict[str, Any]]:
    """What each of two ranks reports."""
    return launch("parallel.py")


@pytest.mark.parametrize("variant", WEIGHTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_each_rank_has_its_part(parallel, variant, rank):
    """Law 1, losses and weights as without memtrace; weights, gradients and state of the rank's own part alone."""
    run = parallel[rank][variant]
    assert_law_1(run)
    assert run["losses"] == run["plain_losses"]
    assert run["same_weights"]
    for step in traced(run):
        moment = step["moments"]["backward_end"]
        assert total(moment, "weights") == WEIGHTS[variant]
        assert total(moment, "gradients") == WEIGHTS[variant]
        assert total(step["moments"]["step_end"], "optimizer_state", "exp_avg") == STATE[variant]
        peak = step["moments"]["peak"]
        assert total(peak, "unattributed") - KEPT.get(variant, 0) <= 0.01 * peak["allocated_bytes"]


def test_what_compression_keeps_is_the_hooks(parallel):
    """What was lost of each gradient, and two narrow matrices for each large one, beside the bucket.

    Of that there may be a copy: gloo gives the hook's own back when its thread comes to it."""
    for run in (rank["compressed"] for rank in parallel):
        moment = list(traced(run))[-1]["moments"]["step_end"]
        narrow = 4 * 4 * 2 * (WIDTH + 4 * WIDTH)
        assert total(moment, "comm_buffers", "hook") == WHOLE + narrow
        assert total(moment, "comm_buffers", "bucket") in (WHOLE, 2 * WHOLE)

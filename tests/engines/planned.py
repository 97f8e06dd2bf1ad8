"""Simulated plans held against what ranks of real engines measured."""

from __future__ import annotations

import sys
from itertools import count
from typing import Any

from conftest import WORKERS
from entries import traced

from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import plan
from memtrace.record.categories import PERSISTENT, Category, Moment
from memtrace.record.plan import Plan

RANKS = 2
BOUND = 0.05
"""By how much the planned peak may miss the measured one."""


def plan_of_rank(rank: int, recipe: str, settings: dict[str, Any]) -> Plan:
    """Returns the plan of what the workers train, on one of two ranks."""
    sys.path.insert(0, str(WORKERS))
    try:
        import model
        from report import MICRO_BATCHES
    finally:
        sys.path.remove(str(WORKERS))
    number, settings = count(), dict(settings)
    build = getattr(model, settings.pop("build", "build_model"))
    return plan(
        build,
        lambda: model.batch(rank, next(number)),
        recipe=recipe,
        accumulation_steps=MICRO_BATCHES,
        sharding=Sharding(world_size=RANKS, rank=rank, **settings),
        device="cpu",
    )


def check_lasting(planned: Plan, run: dict[str, Any]) -> None:
    """Every entry of the categories that outlive a step is equal to the byte, at three moments of a traced step."""
    measured = next(traced(run))["moments"]
    # FSDP2's buffers live for a part of a step, and on gloo's threads now and then a little longer.
    passing = {Category.COMM_BUFFERS} if run.get("engines") == ["FSDP2"] else set()
    lasting = PERSISTENT - passing
    for moment in (Moment.FORWARD_END, Moment.BACKWARD_END, Moment.STEP_END):
        wanted = {tuple(key): size for *key, size in measured[moment]["entries"] if key[0] in lasting}
        found = {tuple(key): size for key, size in planned.moments[moment].entries.items() if key[0] in lasting}
        assert found == wanted, moment


def least_peak(runs: list[dict[str, Any]]) -> int:
    """Returns the smallest of the peaks that the ranks measured, in steps with and without memtrace.

    Gloo's threads drop some buffers late, now and then, which adds up to 6 %; ranks differ by padding, 0.1 %.
    """
    peaks = [run["plain_peak"] for run in runs]
    return min(peaks + [step["moments"]["peak"]["allocated_bytes"] for run in runs for step in traced(run)])


def plan_rows(runs: list[dict[str, Any]], plans: dict[str, tuple[str, str, dict[str, Any]]]) -> list[list[str]]:
    """Returns the rows of a table of errors, checked.

    Args:
        runs: the report of each rank.
        plans: for each variant its label, its recipe and its settings.
    """
    rows = []
    for variant, (label, recipe, settings) in plans.items():
        measured = [ranks[variant] for ranks in runs]
        planned = [plan_of_rank(rank, recipe, settings) for rank in range(RANKS)]
        for rank in range(RANKS):
            check_lasting(planned[rank], measured[rank])
        errors = [made.total_bytes / least_peak(measured) - 1 for made in planned]
        assert max(map(abs, errors)) <= BOUND, (variant, errors)
        rows.append([label, f"{planned[0].total_bytes:,}", *(f"{error:+.2%}" for error in errors)])
    return rows


HEADER = ["", "planned peak of rank 0, bytes", "error, rank 0", "error, rank 1"]

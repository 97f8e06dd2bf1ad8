"""The formula against a live run on the CPU: what lasts is the same to the byte."""

from __future__ import annotations

import pytest
import torch
from laws.birth import STRICT, events_from_birth
from torch import nn

from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

COMPARED = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE)
SIDE = 64


def measured(dtype: torch.dtype, *, masters: bool, frozen: bool) -> tuple[int, int, StepRecord]:
    """Trains two layers for two steps; returns all parameters, those that are trained, and the record of the step."""
    torch.manual_seed(0)
    with events_from_birth() as source:
        model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, SIDE)).to(dtype)
        model[0].requires_grad_(not frozen)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        copies = [parameter.detach().float().requires_grad_() for parameter in trained] if masters else trained
        optimizer = torch.optim.AdamW(copies, lr=1e-3)
        with Tracer(model, optimizer, STRICT, source=source) as tracer:
            for _ in range(2):
                model(torch.ones(4, SIDE, dtype=dtype)).float().square().mean().backward()
                for copy, parameter in zip(copies, trained, strict=True):
                    assert parameter.grad is not None
                    copy.grad = parameter.grad.to(copy.dtype)
                optimizer.step()
                with torch.no_grad():
                    for copy, parameter in zip(copies, trained, strict=True):
                        parameter.copy_(copy)
                model.zero_grad()
                optimizer.zero_grad()
        record = tracer.latest
    assert record is not None and record.traced
    every = sum(parameter.numel() for parameter in model.parameters())
    return every, sum(parameter.numel() for parameter in trained), record


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "one layer frozen"])
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("fp32", torch.float32), ("pure-bf16", torch.bfloat16), ("bf16-master", torch.bfloat16)],
)
def test_persistent_categories_are_exact(recipe: str, dtype: torch.dtype, frozen: bool) -> None:
    """Weights, masters and moments at the end of a step are as planned, by component and type."""
    every, trained, record = measured(dtype, masters=recipe == "bf16-master", frozen=frozen)
    plan = plan_by_formula(
        PlanRequest(
            parameters=every,
            trainable_parameters=trained,
            recipe=find_recipe(recipe),
            optimizer=find_optimizer("adamw"),
        )
    )

    def compared(entries: dict[EntryKey, int]) -> dict[EntryKey, int]:
        return {key: size for key, size in entries.items() if key.category in COMPARED and key.component != "step"}

    live = compared(dict(record.moments[Moment.STEP_END].entries))
    assert live == compared(dict(plan.moments[Moment.STEP_END].entries))

"""A bound on the peak of a step, for tests: `assert_peak`, and the plan that it looks at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtrace.gate.result import CaseResult
from memtrace.gate.step_plan import planned
from memtrace.planning.optimizers.updates import MakeOptimizer
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import training_with
from memtrace.planning.simulated_run import Loss
from memtrace.record.categories import Moment
from memtrace.record.units import format_bytes, parse_bytes

_LISTED = 8
"""Parts of the peak that a failure names."""


def memory_plan(
    model_or_build: nn.Module | Callable[[], nn.Module],
    batch: Any,
    *,
    recipe: str = "fp32",
    optimizer: str | MakeOptimizer = "adamw",
    loss: Loss | None = None,
    accumulation_steps: int = 1,
    sharding: Sharding | None = None,
    device: str = "cuda",
    keep_outputs: bool = False,
) -> CaseResult:
    """Returns what a training step takes, by moment, category and module; it needs neither a GPU nor the memory.

    Args:
        model_or_build: the model, which is left as it is, or a function that makes one. A function is called with the
            meta device as the default, so that a model of any size can be made.
        batch: one micro batch, or a function that returns it, as for `memtrace.plan`.
        recipe: as all others, see `memtrace.plan`.
        optimizer: by name, or a function of a list of parameters.
        loss: a function of (model, batch); by default what the model returns as `loss`.
        accumulation_steps: micro batches for each optimizer step.
        sharding: how ranks share the model.
        device: `cuda`, `cpu` or the name of a GPU.
        keep_outputs: whether the loop keeps the output of the model into the next step.

    Raises:
        PlanError: the step cannot be planned.
    """
    training = training_with(
        (lambda: _without_memory(model_or_build)) if isinstance(model_or_build, nn.Module) else model_or_build,
        batch if callable(batch) else _copies(batch, 2 * accumulation_steps).pop,
        recipe=recipe,
        optimizer=optimizer,
        loss=loss,
        accumulation_steps=accumulation_steps,
        sharding=sharding,
        device=device,
        keep_outputs=keep_outputs,
    )
    return planned(training)


def assert_peak(
    model_or_build: nn.Module | Callable[[], nn.Module], batch: Any, *, at_most: int | str, **settings: Any
) -> CaseResult:
    """Returns what a training step takes, where its peak is within a bound.

    Args:
        model_or_build: as for `memory_plan`.
        batch: as for `memory_plan`.
        at_most: bytes, or a size such as `24GiB`.
        settings: those of `memory_plan`, such as `recipe`.

    Raises:
        AssertionError: the peak is over the bound; the message names the categories and modules that take most of it.
        ConfigError: the bound is no size.
        PlanError: the step cannot be planned.
    """
    __tracebackhide__ = True
    bound = parse_bytes(at_most) if isinstance(at_most, str) else at_most
    result = memory_plan(model_or_build, batch, **settings)
    if result.peak_bytes > bound:
        raise AssertionError(_over(result, bound))
    return result


def _over(result: CaseResult, bound: int) -> str:
    peak = result.peak_bytes
    parts = [
        (size, f"{entry} of {module}" if module else f"{entry} outside of the model")
        for entry, sizes in result.modules[Moment.PEAK].items()
        for module, size in sizes.items()
    ]
    largest = sorted(parts, key=lambda part: (-part[0], part[1]))[:_LISTED]
    lines = [f"  {format_bytes(size)} {name}" for size, name in largest]
    rest = peak - sum(size for size, _ in largest)
    if rest:
        lines.append(f"  {format_bytes(rest)} of {len(parts) - len(largest)} others")
    over = f"{format_bytes(peak - bound)} over the bound of {format_bytes(bound)}"
    return "\n".join([f"the peak is {format_bytes(peak)} ({peak:,} bytes), {over}; at the peak:", *lines])


def _copies(batch: Any, count: int) -> list[Any]:
    """Returns copies of a micro batch, one for each of two steps: a loop drops each one after its step."""
    return [copy.deepcopy(batch) for _ in range(count)]


def _without_memory(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose parameters and buffers are on the meta device; what is shared stays so."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        copies[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, copies)

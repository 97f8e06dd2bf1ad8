"""The layouts against the state of the real optimizers after a step."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
import torch
from transformers.training_args import OptimizerNames

import memtrace
from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.layouts import LBFGS_HISTORY, MATRIX_SIDE, RANK
from memtrace.planning.optimizers.simulated import StepKernels, keeps_only, make_optimizer, steps_fused
from memtrace.planning.optimizers.states import OPTIMIZERS, find_optimizer
from memtrace.planning.optimizers.trainer import NOT_PLANNED
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.record.categories import Category, Moment

SHAPE = (8, 8)
DENSE = [
    name
    for name, layout in OPTIMIZERS.items()
    if layout.source.startswith("torch.optim.") and name not in ("lbfgs", "adafactor")
]
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw-amsgrad": {"amsgrad": True},
    "sgd-momentum": {"momentum": 0.9},
    "rmsprop-momentum": {"momentum": 0.9},
    "rmsprop-centered": {"centered": True},
}


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class that a layout names as its source."""
    module, _, attribute = find_optimizer(name).source.partition("(")[0].rpartition(".")
    found: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(module), attribute)
    return found


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a state entry."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def state_after_a_step(name: str, dtype: torch.dtype, **arguments: Any) -> dict[str, list[torch.Tensor]]:
    """What the real optimizer keeps for one matrix, without scalars."""
    parameter = torch.nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = optimizer_class(name)([parameter], **arguments)
    parameter.grad = torch.ones(SHAPE, dtype=dtype)
    if name == "sparseadam":
        parameter.grad = parameter.grad.to_sparse()
    optimizer.step()
    kept = {key: [item for item in tensors(value) if item.dim()] for key, value in optimizer.state[parameter].items()}
    return {key: items for key, items in kept.items() if items}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_torch_optimizers(name: str, dtype: torch.dtype) -> None:
    """Each state tensor of the real optimizer is in the layout, with its name, size and type, and no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sparse tensors
        kept = state_after_a_step(name, dtype, **_ARGUMENTS.get(name, {}))
    layout = find_optimizer(name)
    assert set(kept) == {state.component for state in layout.states}
    for state in layout.states:
        (tensor,) = kept[state.component]
        assert tensor.numel() == state.elements * SHAPE[0] * SHAPE[1]
        assert str(tensor.dtype) == f"torch.{state.dtype}" if state.dtype else tensor.dtype == dtype


@pytest.mark.parametrize(("name", "arguments"), [("adafactor", {}), ("adafactor-hf", {"warmup_init": False})])
def test_adafactor_keeps_a_row_and_a_column(name: str, arguments: dict[str, Any]) -> None:
    """The factored states of a square matrix are its side each, of the type that the layout says."""
    kept = state_after_a_step(name, torch.bfloat16, **arguments)
    layout = find_optimizer(name)
    assert set(kept) == {state.component for state in layout.states}
    for state in layout.states:
        (tensor,) = kept[state.component]
        assert tensor.numel() == SHAPE[0]
        assert state.elements * MATRIX_SIDE**2 == MATRIX_SIDE
        assert str(tensor.dtype) == f"torch.{state.dtype or 'bfloat16'}"


def test_lbfgs_fills_its_history() -> None:
    """After many iterations LBFGS keeps as many directions and steps as the layout counts."""
    parameter = torch.nn.Parameter(torch.linspace(-3, 3, 64))
    optimizer = torch.optim.LBFGS([parameter], lr=1e-3, max_iter=3 * LBFGS_HISTORY, tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (parameter.exp() + parameter**4).sum()
        value.backward()
        return value

    optimizer.step(loss)
    kept = optimizer.state[parameter]
    for state in find_optimizer("lbfgs").states:
        assert sum(tensor.numel() for tensor in tensors(kept[state.component])) == state.elements * 64


def test_all_optimizers_of_torch_have_a_layout() -> None:
    """What torch.optim ships can be planned for."""
    shipped = {name for name, item in vars(torch.optim).items() if isinstance(item, type)} - {"Optimizer"}
    planned = {
        layout.source.removeprefix("torch.optim.").partition("(")[0]
        for layout in OPTIMIZERS.values()
        if layout.source.startswith("torch.optim.")
    }
    assert planned == shipped


def test_8_bit_adamw_has_a_scale_for_256_elements() -> None:
    """Two states of one byte and two float32 scales for each block of 256: 2.03 bytes a parameter.

    Recorded from bitsandbytes 0.50.2: a matrix of 256 x 64 has state1 and state2 of 16,384 bytes in uint8, absmax1 and
    absmax2 of 64 float32 each.
    """
    sizes = {
        state.component: (int(state.elements * 256 * 64), state.dtype) for state in find_optimizer("adamw8bit").states
    }
    assert sizes == {
        "state1": (16384, "uint8"),
        "state2": (16384, "uint8"),
        "absmax1": (64, "float32"),
        "absmax2": (64, "float32"),
    }


def test_an_unknown_optimizer_is_met_with_the_nearest() -> None:
    """A misspelt optimizer is an error that helps."""
    with pytest.raises(PlanError, match="did you mean 'adamw8bit'"):
        find_optimizer("adamw8bits")


def test_every_name_of_trainer_is_planned_or_refused_with_what_to_plan() -> None:
    """`optim=` of Trainer, word for word: a layout, and states of just that size in a simulated step, or an error that
    names another optimizer."""
    parameter = torch.nn.Parameter(torch.ones(MATRIX_SIDE, 4))
    side, large = (torch.nn.Parameter(torch.ones(256, columns)) for columns in (256, 400))
    for known in OptimizerNames:
        name = known.value
        if name in NOT_PLANNED:
            with pytest.raises(PlanError, match=f"{name} cannot be planned: .*plan (ada|sgd|galore|apollo)"):
                make_optimizer(name, StepKernels.FUSED)
            continue
        layout = find_optimizer(name)
        if not keeps_only(name):
            continue
        optimizer = make_optimizer(name, StepKernels.FUSED)([parameter, side, large])
        for one in (parameter, side, large):
            one.grad = torch.ones_like(one)
        optimizer.step()
        kept = optimizer.state[side]
        components = {state.component for state in layout.states}
        assert set(kept) == components
        on_device = {name for name in components if name.startswith("absmax")} if layout.paged else components
        assert set(optimizer.state[large]) == on_device
        for state in layout.states:
            if state.component in kept and state.elements >= Fraction(1, 2) and not state.low_rank:
                assert kept[state.component].numel() == state.elements * side.numel()
                assert str(kept[state.component].dtype) == f"torch.{state.dtype or 'float32'}"
        if "low" in str(layout.note) and layout.states[0].low_rank:
            assert kept[layout.states[0].component].numel() == RANK * 256
    assert steps_fused("adamw_torch_fused", StepKernels.FOREACH)
    assert not steps_fused("adamw_torch", StepKernels.FOREACH)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("schedule_free_adamw", {}), ("schedule_free_radam", {}), ("schedule_free_sgd", {})],
)
def test_schedule_free_optimizers_keep_what_their_layout_says(name: str, arguments: dict[str, Any]) -> None:
    """The real optimizers after a step: `z` and the second moment, as large as the weights."""
    parameter = torch.nn.Parameter(torch.ones(SHAPE))
    optimizer = optimizer_class(name)([parameter], lr=0.1, **arguments)
    optimizer.train()  # type: ignore[attr-defined]
    parameter.grad = torch.ones(SHAPE)
    optimizer.step()
    kept = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
    assert {key: value.numel() for key, value in kept.items()} == {
        state.component: state.elements * SHAPE[0] * SHAPE[1] for state in find_optimizer(name).states
    }


def test_paged_states_are_in_host_memory() -> None:
    """They lie outside of torch's allocator: none on the device, all of them counted for the host."""
    request = PlanRequest(
        parameters=10**6, recipe=find_recipe("pure-bf16"), optimizer=find_optimizer("paged_adamw_32bit")
    )
    plan = plan_by_formula(request)
    assert plan.host_bytes == 8 * 10**6
    assert plan.moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == 0


def test_a_simulated_plan_counts_paged_states_for_the_host() -> None:
    """Of a matrix of 262,144 elements 8 bits twice; the scales of both and the states of its bias are the device's."""
    plan = memtrace.plan(
        lambda: torch.nn.Linear(512, 512),
        lambda: torch.ones(2, 512),
        recipe="pure-bf16",
        optimizer="paged_adamw_8bit",
        loss=lambda model, batch: model(batch).float().sum(),
    )
    assert plan.host_bytes == 2 * 512 * 512
    assert plan.moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == 2 * (4 * 512 * 512 // 256 + 4 * 512)
    assert any("counted for the host" in said for said in plan.assumptions)


def test_scales_of_paged_states_stay_on_the_device() -> None:
    """A float32 number for each 256 elements of both 8-bit states."""
    request = PlanRequest(
        parameters=10**6, recipe=find_recipe("pure-bf16"), optimizer=find_optimizer("paged_adamw_8bit")
    )
    plan = plan_by_formula(request)
    assert plan.host_bytes == 2 * 10**6
    assert plan.moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == 2 * 4 * ceil(10**6 / 256)

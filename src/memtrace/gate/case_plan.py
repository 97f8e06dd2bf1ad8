"""Plans one case: two steps on tensors without memory, and the bytes of each module at each moment."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrace.errors import ConfigError, PlanError, packages_of
from memtrace.gate.cases import ENTRY_POINT, Case
from memtrace.gate.result import CaseResult
from memtrace.planning.by_module import holdings
from memtrace.planning.hardware import Device, find_device
from memtrace.planning.optimizers.simulated import make_optimizer
from memtrace.planning.optimizers.updates import MakeOptimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.deepspeed_settings import read_deepspeed
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import model_loss, plan_of, step_kernels, workspaces_of
from memtrace.planning.simulated_run import SimulatedRun, Training, refusals, run_two_steps
from memtrace.record.plan import Plan
from memtrace.simulation.kernels import Target

_POSITIONS = 2048
"""Tokens of a text where nobody says how many."""


def plan_case(case: Case, root: Path, python_path: Sequence[Path] = ()) -> CaseResult:
    """Returns what a case takes: the same bytes whatever was planned before, on any machine.

    Args:
        case: what to plan.
        root: the directory in which its paths begin.
        python_path: directories that come first where its functions are imported from; they stay in `sys.path`.

    Raises:
        ConfigError: the case names what is not there.
        PlanError: it cannot be planned.
    """
    sys.path[:0] = [str(path) for path in python_path if str(path) not in sys.path]
    device = None if case.device in tuple(Target) else find_device(case.device)
    target = Target(case.device) if device is None else Target.CUDA
    training = _of_configuration(case, root, target, device) if case.config else _of_build(case, root, target, device)
    run = run_collected(training)
    name = case.optimizer if ENTRY_POINT.fullmatch(case.optimizer) is None else "custom"
    plan = plan_of(run, training.recipe, name, target, training.sharding, device=device)
    return result_of(run, plan)


def result_of(run: SimulatedRun, plan: Plan) -> CaseResult:
    """Returns the plain result of a run in which it was noted when each module runs."""
    by_moment = holdings(run.timeline, run.marks, run.spans, run.owners)
    for moment, breakdown in run.moments.items():
        added = {key: sum(sizes.values()) for key, sizes in by_moment[moment].items()}
        assert added == dict(breakdown.entries), "modules add up to the breakdown"
    return CaseResult(
        modules={
            moment: {" ".join(filter(None, key)): sizes for key, sizes in held.items()}
            for moment, held in by_moment.items()
        },
        reserved_bytes=plan.reserved_bytes,
        host_bytes=plan.host_bytes,
    )


def run_collected(training: Training) -> SimulatedRun:
    """Runs two steps in which reference cycles are collected at the beginning of each micro batch and at no other time.

    Python would look for them after a number of objects that depends on what the process did before.
    """

    def make_batch() -> Any:
        gc.collect()
        return training.make_batch()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        return run_two_steps(replace(training, make_batch=make_batch))
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _of_configuration(case: Case, root: Path, target: Target, device: Device | None) -> Training:
    with packages_of("a case with config"):
        from memtrace.planning.simulation_request import (  # noqa: PLC0415 - transformers takes seconds
            SimulationRequest,
            training_of,
            with_weights,
        )
        from memtrace.simulation.models.builds import BatchSettings, ModelSettings, longest_text  # noqa: PLC0415
        from memtrace.simulation.models.configurations import load_configuration  # noqa: PLC0415

    assert case.config is not None
    recipe = find_recipe(case.recipe)
    here = root / case.config
    configuration = load_configuration(str(here) if here.exists() else case.config)
    longest = longest_text(configuration)
    usual = _POSITIONS if longest is None else min(_POSITIONS, longest)
    targets = None if case.lora_targets in (None, "all-linear") else case.lora_targets
    width = getattr(configuration, "hidden_size", None) or getattr(configuration.get_text_config(), "hidden_size", None)
    return training_of(
        SimulationRequest(
            configuration=configuration,
            recipe=recipe if case.dtype is None else with_weights(recipe, case.dtype),
            optimizer=case.optimizer,
            model=ModelSettings(
                attention=case.attn,
                gradient_checkpointing=case.gradient_checkpointing,
                adapter_rank=case.lora_rank,
                adapter_targets=None if targets is None else tuple(name.strip() for name in targets.split(",")),
            ),
            batch=BatchSettings(
                samples=case.batch_size,
                positions=usual if case.seq_len is None else case.seq_len,
                image_size=case.image_size,
                padded=case.padded,
            ),
            accumulation_steps=case.accumulation_steps,
            keeps_outputs=case.keep_outputs,
            fused_step=case.fused_optimizer,
            target=target,
            device=device,
            sharding=_sharding(case, root, width if isinstance(width, int) else None),
        )
    )


def _of_build(case: Case, root: Path, target: Target, device: Device | None) -> Training:
    assert case.build is not None
    if case.accumulation_steps < 1:
        raise PlanError(f"accumulation_steps must be at least 1, got {case.accumulation_steps}")
    build, recipe, sharding = _function(case, "build"), find_recipe(case.recipe), _sharding(case, root, None)
    made: list[nn.Module] = []

    def make_model() -> Any:
        made[:] = [build()]
        return made[0]

    def usual_batch() -> Any:
        return _transformers_batch(case, made[0], getattr(torch, recipe.weights))

    make: MakeOptimizer
    if ENTRY_POINT.fullmatch(case.optimizer) is None:
        make = make_optimizer(case.optimizer, step_kernels(target, sharding))
    else:
        make = _function(case, "optimizer")
    return Training(
        make_model=make_model,
        make_batch=usual_batch if case.batch is None else _function(case, "batch"),
        loss=model_loss if case.loss is None else _function(case, "loss"),
        recipe=recipe,
        make_optimizer=make,
        accumulation_steps=case.accumulation_steps,
        keeps_outputs=case.keep_outputs,
        target=target,
        sharding=sharding,
        workspaces=workspaces_of(device),
    )


def _transformers_batch(case: Case, model: nn.Module, dtype: torch.dtype) -> Any:
    """Returns a micro batch for a model of transformers, or for the one that adapters are put around."""
    from memtrace.simulation.models.builds import (  # noqa: PLC0415 - transformers takes seconds
        BatchSettings,
        longest_text,
        make_inputs,
        make_labels,
    )

    configuration, kind = getattr(model, "config", None), type(model)
    if not hasattr(configuration, "get_text_config") or not hasattr(kind, "main_input_name"):
        raise PlanError(
            f"case {case.name}: {kind.__name__} is no model of transformers, whose inputs are known: give it batch, "
            "such as batch = 'package.module:function'"
        )
    longest = longest_text(configuration)
    usual = _POSITIONS if longest is None else min(_POSITIONS, longest)
    settings = BatchSettings(
        samples=case.batch_size,
        positions=usual if case.seq_len is None else case.seq_len,
        image_size=case.image_size,
        padded=case.padded,
    )
    return make_inputs(kind, configuration, settings, dtype) | make_labels(kind, configuration, settings)


def _sharding(case: Case, root: Path, width: int | None) -> Sharding:
    if case.deepspeed is None:
        return case.shared()
    if case.shared() != Sharding(world_size=case.world_size):
        raise ConfigError(f"case {case.name}: deepspeed says how ranks share the model: leave sharding and offload out")
    return read_deepspeed(str(root / case.deepspeed), case.world_size, width)


def _function(case: Case, key: str) -> Callable[..., Any]:
    """Returns the function that a key of a case names.

    Raises:
        PlanError: its module cannot be imported.
        ConfigError: the module has no such function.
    """
    module_name, _, path = getattr(case, key).partition(":")
    with refusals(f"case {case.name}: {key} cannot be imported"):
        found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise ConfigError(f"case {case.name}: {key} must name a function, and {module_name} has no {path}")
    return found  # type: ignore[no-any-return]

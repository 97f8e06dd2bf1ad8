"""Plans one case: two steps on tensors without memory, and the bytes of each module at each moment."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrace.errors import ConfigError, PlanError, packages_of
from memtrace.gate.cases import ENTRY_POINT, Case
from memtrace.gate.result import CaseResult
from memtrace.gate.step_plan import planned
from memtrace.planning.hardware import Device
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.deepspeed_settings import read_deepspeed
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.simulate import on_device, training_with
from memtrace.planning.simulated_run import Training, refusals
from memtrace.simulation.kernels import Target


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
    if case.config is None:
        return planned(_of_build(case, root))
    target, device = on_device(case.device)
    return planned(_of_configuration(case, root, target, device))


def _of_configuration(case: Case, root: Path, target: Target, device: Device | None) -> Training:
    with packages_of("a case with config"):
        from memtrace.planning.simulation_request import (  # noqa: PLC0415 - transformers takes seconds
            request_of,
            training_of,
        )
        from memtrace.simulation.models.configurations import load_configuration, width_of  # noqa: PLC0415

    assert case.config is not None
    here = root / case.config
    configuration = load_configuration(str(here) if here.exists() else case.config)
    sharding = _sharding(case, root, width_of(configuration))
    return training_of(request_of(case, configuration, target=target, sharding=sharding, device=device))


def _of_build(case: Case, root: Path) -> Training:
    build, recipe, sharding = _function(case, "build"), find_recipe(case.recipe), _sharding(case, root, None)
    made: list[nn.Module] = []

    def make_model() -> Any:
        made[:] = [build()]
        if not isinstance(made[0], nn.Module):
            raise PlanError(f"build must return a torch.nn.Module: {case.build} returned a {type(made[0]).__name__}")
        return made[0]

    def usual_batch() -> Any:
        return _transformers_batch(case, made[0], getattr(torch, recipe.weights))

    named = ENTRY_POINT.fullmatch(case.optimizer) is None
    return training_with(
        make_model,
        usual_batch if case.batch is None else _function(case, "batch"),
        loss=None if case.loss is None else _function(case, "loss"),
        recipe=case.recipe,
        optimizer=case.optimizer if named else _function(case, "optimizer"),
        accumulation_steps=case.accumulation_steps,
        keep_outputs=case.keep_outputs,
        sharding=sharding,
        device=case.device,
    )


def _transformers_batch(case: Case, model: nn.Module, dtype: torch.dtype) -> Any:
    """Returns a micro batch for a model of transformers, or for the one that adapters are put around."""
    from memtrace.planning.simulation_request import batch_of  # noqa: PLC0415 - transformers takes seconds
    from memtrace.simulation.models.builds import make_inputs, make_labels  # noqa: PLC0415

    configuration, kind = getattr(model, "config", None), type(model)
    if not hasattr(configuration, "get_text_config") or not hasattr(kind, "main_input_name"):
        raise PlanError(
            f"{kind.__name__} is no model of transformers, whose inputs are known: give it batch, "
            "such as batch = 'package.module:function'"
        )
    settings = batch_of(case, configuration)
    return make_inputs(kind, configuration, settings, dtype) | make_labels(kind, configuration, settings)


def _sharding(case: Case, root: Path, width: int | None) -> Sharding:
    if case.deepspeed is None:
        return case.shared()
    if case.shared() != Sharding(world_size=case.world_size):
        raise ConfigError("deepspeed says how ranks share the model: leave sharding and offload out")
    return read_deepspeed(str(root / case.deepspeed), case.world_size, width)


def _function(case: Case, key: str) -> Callable[..., Any]:
    """Returns the function that a key of a case names.

    Raises:
        PlanError: its module cannot be imported.
        ConfigError: the module has no such function.
    """
    module_name, _, path = getattr(case, key).partition(":")
    with refusals(f"{key} cannot be imported"):
        found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise ConfigError(f"{key} must name a function, and {module_name} has no {path}")
    return found  # type: ignore[no-any-return]

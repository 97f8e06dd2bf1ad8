"""The optimizers that a simulated step runs, by the names of `memtrace.planning.optimizers.states`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from math import ceil
from types import MappingProxyType
from typing import Any

import torch

from memtrace.errors import PlanError
from memtrace.planning.optimizers.layouts import FACTOR, RANK, OptimizerLayout, State, is_scale
from memtrace.planning.optimizers.states import OPTIMIZERS, find_optimizer
from memtrace.planning.optimizers.trainer import OTHER_NAMES
from memtrace.planning.optimizers.updates import MakeOptimizer

_MIN_8BIT_SIZE = 4096
"""Parameters with fewer elements keep float32 states. Source: bitsandbytes, optim/optimizer.py, `min_8bit_size`."""

_MIN_PAGED_SIZE = 100_000
"""Parameters with fewer elements keep their states on the device. Source: as above, `get_state_buffer`."""

_Build = Callable[..., torch.optim.Optimizer]


class StepKernels(StrEnum):
    """How torch's optimizers go through the parameters."""

    LOOP = "loop"
    """One at a time, torch's default on a CPU."""
    FOREACH = "foreach"
    """As lists, torch's default on a GPU."""
    FUSED = "fused"
    """In one kernel, without temporaries."""


_FUSED = frozenset({"adamw", "adam", "adamw-amsgrad", "sgd", "sgd-momentum", "adagrad"})
"""Optimizers of torch that have a fused kernel."""

_FOREACH: Mapping[str, tuple[_Build, Mapping[str, Any]]] = MappingProxyType(
    {
        "adamw": (torch.optim.AdamW, {}),
        "adam": (torch.optim.Adam, {}),
        "adamw-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
        "sgd": (torch.optim.SGD, {}),
        "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "adafactor": (torch.optim.Adafactor, {}),
        "adagrad": (torch.optim.Adagrad, {}),
        "adadelta": (torch.optim.Adadelta, {}),
        "adamax": (torch.optim.Adamax, {}),
        "nadam": (torch.optim.NAdam, {}),
        "radam": (torch.optim.RAdam, {}),
        "rmsprop": (torch.optim.RMSprop, {}),
        "rmsprop-momentum": (torch.optim.RMSprop, {"momentum": 0.9}),
        "rmsprop-centered": (torch.optim.RMSprop, {"centered": True}),
        "rprop": (torch.optim.Rprop, {}),
        "asgd": (torch.optim.ASGD, {}),
    }
)
"""Optimizers of torch that work on lists of parameters where they are asked to."""

_NOT_SIMULATED: Mapping[str, str] = MappingProxyType(
    {
        "sparseadam": "it needs sparse gradients, which a plan does not make",
        "muon": "it updates matrices only: pass your own function that returns the optimizer",
        "lbfgs": "its step runs the model again and again",
        "none": "nothing is trained then: use --params for a plan of the weights alone",
    }
)


class KeptStates(torch.optim.Optimizer):
    """What an optimizer keeps by its layout, for one that torch does not have: its kernels take no memory.

    It updates nothing. States that are paged are not made: they lie outside of torch's allocator.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], layout: OptimizerLayout) -> None:
        super().__init__(parameters, {})
        self._layout = layout

    @property
    def paged_bytes(self) -> int:
        """What the states take that are paged."""
        return sum(_paged_for(parameter, self._layout) for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Makes the states of parameters that have none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = dict(_kept_for(parameter, self._layout))


def make_optimizer(name: str, kernels: StepKernels) -> MakeOptimizer:
    """Returns a function that makes the optimizer with this name.

    Args:
        name: as in `memtrace.planning.optimizers.states`.
        kernels: how it goes through the parameters. FUSED is FOREACH where it has no fused kernel.

    Raises:
        PlanError: the name is not known, or the optimizer cannot be simulated.
    """
    fused = name.casefold() == "adamw_torch_fused"
    layout = find_optimizer(name)
    name = layout.name
    if name in _NOT_SIMULATED:
        raise PlanError(f"the optimizer {name} cannot be simulated: {_NOT_SIMULATED[name]}")
    if name == "adafactor-hf":
        return _transformers_adafactor
    if name not in _FOREACH:
        return lambda parameters: KeptStates(parameters, layout)
    build, settings = _FOREACH[name]
    if (fused or kernels is StepKernels.FUSED) and name in _FUSED:
        return lambda parameters: build(parameters, fused=True, **settings)
    return lambda parameters: build(parameters, foreach=kernels is not StepKernels.LOOP, **settings)


def steps_fused(name: str, kernels: StepKernels) -> bool:
    """Returns whether the optimizer with this name takes its step in one kernel, without temporaries."""
    name = name.casefold()
    return name == "adamw_torch_fused" or (kernels is StepKernels.FUSED and OTHER_NAMES.get(name, name) in _FUSED)


def keeps_only(name: str) -> bool:
    """Returns whether the step of the optimizer with this name is not run: what it keeps is all that is planned."""
    name = OTHER_NAMES.get(name.casefold(), name.casefold())
    return name not in _FOREACH and name in OPTIMIZERS and name not in ("adafactor-hf", *_NOT_SIMULATED)


def _transformers_adafactor(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    try:
        from transformers.optimization import Adafactor  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise PlanError(
            "the optimizer adafactor-hf needs transformers: pip install torch-memtrace[transformers]"
        ) from error
    return Adafactor(parameters)  # type: ignore[no-untyped-call]


def _kept_for(parameter: torch.Tensor, layout: OptimizerLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the states of one parameter by name, as far as they lie on the device."""
    small = parameter.numel() < _MIN_8BIT_SIZE and any(map(is_scale, layout.states))
    paged = _is_paged(parameter, layout)
    for state in layout.states:
        dtype = _dtype(state, parameter)
        if (small and is_scale(state)) or (paged and not is_scale(state)):
            continue
        yield state.component, torch.zeros(_elements(state, parameter), dtype=torch.float32 if small else dtype)


def _paged_for(parameter: torch.Tensor, layout: OptimizerLayout) -> int:
    """Returns the bytes of the states of one parameter that lie outside of torch's allocator."""
    if not _is_paged(parameter, layout):
        return 0
    paged = [state for state in layout.states if not is_scale(state)]
    return sum(_elements(state, parameter) * _dtype(state, parameter).itemsize for state in paged)


def _is_paged(parameter: torch.Tensor, layout: OptimizerLayout) -> bool:
    return layout.paged and parameter.numel() >= _MIN_PAGED_SIZE


def _dtype(state: State, parameter: torch.Tensor) -> torch.dtype:
    found: torch.dtype = parameter.dtype if state.dtype is None else getattr(torch, state.dtype)
    return found


def _elements(state: State, parameter: torch.Tensor) -> int:
    if state.low_rank and parameter.dim() == 2:
        rank: int = min(RANK, *parameter.shape)
        side: int = min(parameter.shape) if state.component == "projector" else max(parameter.shape)
        return rank * side
    if state.low_rank:
        return 0 if state.component == "projector" else parameter.numel()
    if state.elements == FACTOR:
        return max(parameter.shape, default=1)
    return ceil(parameter.numel() * state.elements)

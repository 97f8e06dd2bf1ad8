"""The optimizers that a simulated step runs, by the names of `memtrace.planning.optimizers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch

from memtrace.errors import PlanError
from memtrace.planning.optimizers import BLOCK_SIZE_8BIT, find_optimizer
from memtrace.planning.updates import MakeOptimizer

_MIN_8BIT_SIZE = 4096
"""Parameters with fewer elements keep float32 states. Source: bitsandbytes, optim/optimizer.py, `min_8bit_size`."""

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


class BlockwiseAdamW(torch.optim.Optimizer):
    """What bitsandbytes.optim.AdamW8bit keeps: both moments in 8 bits, with one float32 scale for each block.

    It updates nothing: its kernel works in place and takes no memory.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Makes the states of parameters that have none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _blockwise_state(parameter)


def make_optimizer(name: str, kernels: StepKernels) -> MakeOptimizer:
    """Returns a function that makes the optimizer with this name.

    Args:
        name: as in `memtrace.planning.optimizers`.
        kernels: how it goes through the parameters. FUSED is FOREACH where it has no fused kernel.

    Raises:
        PlanError: the name is not known, or the optimizer cannot be simulated.
    """
    name = find_optimizer(name).name
    if name in _NOT_SIMULATED:
        raise PlanError(f"the optimizer {name} cannot be simulated: {_NOT_SIMULATED[name]}")
    if name == "adamw8bit":
        return BlockwiseAdamW
    if name == "adafactor-hf":
        return _transformers_adafactor
    build, settings = _FOREACH[name]
    if kernels is StepKernels.FUSED and name in _FUSED:
        return lambda parameters: build(parameters, fused=True, **settings)
    return lambda parameters: build(parameters, foreach=kernels is not StepKernels.LOOP, **settings)


def steps_fused(name: str, kernels: StepKernels) -> bool:
    """Returns whether the optimizer with this name takes its step in one kernel, without temporaries."""
    name = name.casefold()
    return name == "adamw8bit" or (kernels is StepKernels.FUSED and name in _FUSED)


def _transformers_adafactor(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    try:
        from transformers.optimization import Adafactor  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise PlanError(
            "the optimizer adafactor-hf needs transformers: pip install torch-memtrace[transformers]"
        ) from error
    return Adafactor(parameters)  # type: ignore[no-untyped-call]


def _blockwise_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if parameter.numel() < _MIN_8BIT_SIZE:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // BLOCK_SIZE_8BIT)
    return {
        "state1": torch.zeros_like(parameter, dtype=torch.uint8),
        "state2": torch.zeros_like(parameter, dtype=torch.uint8),
        "absmax1": torch.zeros(blocks),
        "absmax2": torch.zeros(blocks),
    }

"""Gradients that are dropped before an optimizer has used them: the step that they were made for is over."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from memtrace.attribution.scan import Scan
from memtrace.sources.hooks import GradientHook, HookSet, hears_gradient

_IN_A_ROW = 3
"""Steps with dropped gradients in a row after which they are a part of each step."""


class _Gradient(GradientHook):
    """Whether a parameter has had a gradient, and what it was then. Refers to nothing, since torch keeps it."""

    __slots__ = ("has_come", "identity", "version")

    def __init__(self) -> None:
        self.has_come = False
        self.identity = self.version = 0

    def __call__(self, parameter: torch.Tensor) -> None:
        # In each backward pass there is, also of steps that are skipped: nothing is called here.
        self.has_come, self.identity, self.version = True, id(parameter), parameter._version


class DroppedGradients:
    """Ends steps that no optimizer ends: a `GradScaler` that finds an overflow steps none, and the loop goes on.

    One parameter stands for all. Its gradient has come and is gone before the next forward pass, while no optimizer has
    stepped and its value is as it was: then the loop has dropped what the step was for. Where gradients are updated
    inside the backward pass, or a first half of a step has moved the parameters (sharpness-aware minimisation), its
    value has changed. A loop that drops gradients in every step (of a backward pass for the inputs alone) is seen to do
    so after three steps.

    Not seen: gradients that are set to zero in place, or only between the forward and the backward pass; one optimizer
    of several that is skipped.

    Args:
        scan: knows the parameters and the engines.
    """

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self._holder: Callable[[], nn.Module | None] = _nobody
        self._name = ""
        self.gradient = _Gradient()
        """Of the parameter, since an optimizer has begun to step."""
        self._in_this_step = False
        self.in_a_row = 0
        """Steps in a row in which gradients were dropped, the one at work included."""

    def follow(self, model: nn.Module, hooks: HookSet) -> None:
        """Looks at the first parameter that is trained, until the hooks are closed; call it again where that changes.

        Its gradient is mostly among the last of a backward pass, so that one that fails on its way has none.
        """
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and parameter.is_leaf:
                    self._holder, self._name = weakref.ref(module), name
                    if not hears_gradient(parameter, self.gradient):
                        hooks.after_gradient((parameter,), self.gradient, first=True)
                    return

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that stands for all; None where there is none any more."""
        holder = self._holder()
        return None if holder is None else holder._parameters.get(self._name)

    @property
    def are_dropped(self) -> bool:
        """Whether gradients have come and are gone, and nothing was done with them."""
        gradient = self.gradient
        if not gradient.has_come:
            return False
        parameter = self.parameter
        if parameter is None or id(parameter) != gradient.identity or parameter.grad is not None:
            return False
        return parameter._version == gradient.version and all(engine.leaves_gradients for engine in self._scan.engines)

    def end_step(self) -> bool:
        """Takes it that gradients were dropped; returns whether the step at work is over by that."""
        self.gradient.has_come = False
        self.in_a_row += not self._in_this_step
        self._in_this_step = True
        return self.in_a_row <= _IN_A_ROW

    def stepped(self) -> None:
        """Notes that an optimizer has stepped."""
        if not self._in_this_step:
            self.in_a_row = 0
        self.gradient.has_come = self._in_this_step = False


def _nobody() -> None:
    """Stands for a module where there is none."""

"""Gradients that are dropped before an optimizer has used them: the step that they were made for is over."""

from __future__ import annotations

import weakref
from itertools import repeat
from typing import Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memtrace.attribution.scan import Scan
from memtrace.sources.hooks import Apart, GradientHook, HookSet, hears_gradient

_IN_A_ROW = 3
"""Steps with dropped gradients in a row after which they are a part of each step."""


class Gradient:
    """What is known of the gradient of the parameter that stands for all. Refers to no tensor."""

    __slots__ = ("has_come", "holder", "name", "version")

    def __init__(self) -> None:
        self.has_come = False
        """Whether it has come since an optimizer has begun to step."""
        self.holder: weakref.ref[nn.Module] | None = None
        """The module that has the parameter; None where no parameter stands for all."""
        self.name = ""
        """The parameter's name in it."""
        self.version: int | None = None
        """Of the parameter's value in the last forward pass."""


class _Arrival(Apart, GradientHook):
    """Notes that a gradient has come, without a call in Python: it does so in each backward pass, of all steps.

    `next`, `map` and `setattr` are none. They cannot raise here, and keep nothing that they are given.
    """

    def __new__(cls, gradient: Gradient) -> Self:
        """Returns the hook; in a backward pass that is a graph the compiler sees a function that does the same."""

        def in_graphs(parameter: torch.Tensor) -> None:
            gradient.has_come = True

        noted = map(setattr, repeat(gradient), repeat("has_come"), repeat(True))
        return super().__new__(cls, next, noted, in_graphs=in_graphs)


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

    __slots__ = ("_arrival", "_in_this_step", "_scan", "gradient", "in_a_row")

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self.gradient = Gradient()
        """Of the parameter that stands for all."""
        self._arrival = _Arrival(self.gradient)
        self._in_this_step = False
        self.in_a_row = 0
        """Steps in a row in which gradients were dropped, the one at work included."""

    def follow(self, model: nn.Module, hooks: HookSet) -> None:
        """Looks at the first parameter that is trained, until the hooks are closed; call it again where that changes.

        Its gradient is mostly among the last of a backward pass, so that one that fails on its way has none.
        """
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter):
                    self.gradient.holder, self.gradient.name = weakref.ref(module), name
                    if not hears_gradient(parameter, self._arrival):
                        self.gradient.has_come = False
                        hooks.after_gradient((parameter,), self._arrival, first=True)
                    return

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that stands for all; None where there is none any more."""
        holder, name = None if self.gradient.holder is None else self.gradient.holder(), self.gradient.name
        if holder is None or name not in holder._parameters:
            return None
        return holder._parameters[name]

    @property
    def are_dropped(self) -> bool:
        """Whether gradients have come and are gone, and nothing was done with them."""
        if not self.gradient.has_come:
            return False
        parameter = self.parameter
        if parameter is None or parameter.grad is not None or not hears_gradient(parameter, self._arrival):
            return False
        same = parameter._version == self.gradient.version
        return same and all(engine.leaves_gradients for engine in self._scan.engines)

    def forward_begins(self) -> None:
        """Notes the value of the parameter; call before each forward pass, after `are_dropped` was asked."""
        parameter = self.parameter
        try:
            self.gradient.version = None if parameter is None else parameter._version
        except RuntimeError:  # made in inference mode: it has none
            self.gradient.version = None

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

"""Gradients that are dropped before an optimizer has used them: the step that they were made for is over."""

from __future__ import annotations

import weakref
from itertools import repeat
from typing import Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memtrace.attribution.scan import Scan
from memtrace.sources.autograd_torch_private import backward_is_running
from memtrace.sources.gradient_hooks import HeardGradient, UnsavedHook, hears_gradient
from memtrace.sources.hooks import Apart

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


class _Arrival(Apart, UnsavedHook):
    """Notes that a gradient has come, without a call in Python.

    `next`, `map` and `setattr` are none. They cannot raise here, and keep nothing that they are given.
    """

    def __new__(cls, gradient: Gradient) -> Self:
        """Returns the hook; in a backward pass that is a graph the compiler sees a function that does the same."""

        def in_graphs(came: torch.Tensor) -> None:
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

    To hear of a gradient is a large part of what memtrace takes of a step of a millisecond. So where steps are skipped
    it is not heard of, until any step of the run has had a forward pass that found no gradient of the pass before it:
    from then on it is in all of them.

    Not seen: gradients that are set to zero in place, or only between the forward and the backward pass; one optimizer
    of several that is skipped; gradients that a run drops for the first time in a step that is skipped, which is one
    with the next.

    Args:
        scan: knows the parameters and the engines.
    """

    __slots__ = ("_arrival", "_heard", "_in_this_step", "_scan", "_stays", "gradient", "in_a_row")

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self.gradient = Gradient()
        """Of the parameter that stands for all."""
        self._arrival = _Arrival(self.gradient)
        self._heard: HeardGradient | None = None
        """The gradient that is heard of."""
        self._stays = False
        """Whether it is from now on, also where steps are skipped."""
        self._in_this_step = False
        self.in_a_row = 0
        """Steps in a row in which gradients were dropped, the one at work included."""

    @property
    def hears(self) -> bool:
        """Whether a gradient is heard of."""
        return self._heard is not None

    def follow(self, model: nn.Module) -> None:
        """Looks at the first parameter that is trained; call it again where that changes.

        Its gradient is mostly among the last of a backward pass, so that one that fails on its way has none.
        """
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter):
                    self.gradient.holder, self.gradient.name = weakref.ref(module), name
                    if self._heard is not None:
                        self.listen()
                    return

    def listen(self) -> None:
        """Hears of the gradient of the parameter that stands for all."""
        parameter = self.parameter
        if parameter is None or (self._heard is not None and hears_gradient(parameter, self._arrival)):
            return
        self.close()
        if parameter.requires_grad and parameter.is_leaf and not backward_is_running():
            self.gradient.has_come = False
            self._heard = HeardGradient(parameter, self._arrival)

    def rest(self) -> None:
        """Hears of no gradient until `listen`, unless the loop has steps that it must be heard of in."""
        if not self._stays and not backward_is_running():
            self.close()

    def close(self) -> None:
        """Hears of no gradient any more; inside a backward pass a next call leaves nothing behind."""
        if self._heard is not None:
            self._heard.close(self.parameter)
            if not backward_is_running():
                self._heard = None

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that stands for all; None where there is none any more."""
        holder, name = None if self.gradient.holder is None else self.gradient.holder(), self.gradient.name
        if holder is None or name not in holder._parameters:
            return None
        return holder._parameters[name]

    @property
    def is_worth_a_look(self) -> bool:
        """Whether there is no gradient before a forward pass that is not the first of its step. Raises nothing."""
        parameter = self.parameter
        return parameter is not None and parameter.grad is None and (self.gradient.has_come or not self._stays)

    def look(self) -> bool:
        """Returns whether gradients have come and are gone, and nothing was done with them.

        Call before each forward pass of a step but its first.
        """
        parameter = self.parameter
        if parameter is None or parameter.grad is not None:
            return False
        self._stays = True
        if not all(engine.leaves_gradients for engine in self._scan.engines):
            return False
        self.listen()
        has_come = self.gradient.has_come and hears_gradient(parameter, self._arrival)
        return has_come and parameter._version == self.gradient.version

    def forward_begins(self) -> None:
        """Notes the value of the parameter; call before each forward pass, after `look`."""
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

"""How ZeRO-3 hears of modules: before and after each of them, in the forward and in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from memtrace.planning.sharding.zero3_fetching import Fetching
from memtrace.simulation.cuda_functions import BackwardToo
from memtrace.simulation.tensor import SimulatedTensor
from memtrace.sources.hooks import HookSet


class _InBackward(torch.autograd.Function):
    """The identity; calls a function when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.call()
        return gradients[0], None


class _Linear(torch.autograd.Function):
    """What DeepSpeed puts in the place of `F.linear`: it saves the parameter itself, not a view of its storage.

    Source: LinearFunctionForZeroStage3 in deepspeed/runtime/zero/linear.py.
    """

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(given, weight, bias)
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        output = given.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        given, weight, bias = ctx.saved_tensors
        of_input = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = rows.t().matmul(given.reshape(-1, given.shape[-1])) if ctx.needs_input_grad[1] else None
        of_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(tuple(range(gradient.dim() - 1)))
        return of_input, of_weight, of_bias


class ZeroFunctions(BackwardToo):
    """Runs linear layers as DeepSpeed does while ZeRO-3 is on, and gathers what a module takes of another module.

    DeepSpeed sees that by a dictionary of parameters of its own; here it is seen by the functions that use them.
    """

    def __init__(self, fetching: Fetching) -> None:
        super().__init__()
        self._fetching = fetching

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns what a function returns under ZeRO-3."""
        if getattr(func, "__name__", "") not in _BOOKKEEPING or func == _SHAPE:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, SimulatedTensor):
                    with torch.no_grad():
                        self._fetching.reaches_for(argument)
        return _linear(*args, **kwargs) if func is F.linear else func(*args, **kwargs)


_BOOKKEEPING = frozenset({"__get__", "__set__", "untyped_storage"})
"""Names of functions that do not compute: attributes, and what attribution asks for."""
_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]  # typed as the value


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _Linear.apply(input, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


def follow_modules(model: nn.Module, fetching: Fetching, hooks: HookSet) -> None:
    """Tells `fetching` of each module of the model."""
    hooks.callback(model.register_forward_pre_hook(lambda *_: fetching.pass_begins()).remove)
    for module in model.modules():
        _Module(module, fetching).follow(hooks)


class _Module:
    """One module: how many gradients of its inputs are to come, and how often its backward pass has to begin."""

    def __init__(self, module: nn.Module, fetching: Fetching) -> None:
        self._module, self._fetching = module, fetching
        self._gradients_to_come = 0

    def follow(self, hooks: HookSet) -> None:
        module = self._module
        hooks.callback(module.register_forward_pre_hook(self._before_forward).remove)
        hooks.callback(module.register_forward_hook(self._after_forward).remove)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with torch.no_grad():
            self._fetching.begins(module, forward=True)
        self._gradients_to_come = 0
        return tuple(
            _mapped(partial(self._watched, self._has_input_gradient, count=True), argument) for argument in args
        )

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        with torch.no_grad():
            self._fetching.ends(module, forward=True)
        return _mapped(partial(self._watched, self._has_output_gradient, count=False), output)

    def _watched(self, call: Callable[[], None], tensor: torch.Tensor, *, count: bool) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        self._gradients_to_come += count
        return _InBackward.apply(tensor, call)  # type: ignore[no-any-return,no-untyped-call]

    def _has_output_gradient(self) -> None:
        with torch.no_grad():
            self._fetching.begins(self._module, forward=False)

    def _has_input_gradient(self) -> None:
        self._gradients_to_come -= 1
        if self._gradients_to_come == 0:
            with torch.no_grad():
                self._fetching.ends(self._module, forward=False)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Returns the value with each tensor in tuples, lists and dicts replaced; a dict is changed in place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        for name in list(value):
            value[name] = _mapped(function, value[name])
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, item) for item in value)
    return value

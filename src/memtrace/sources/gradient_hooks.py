"""Hooks on the gradient of a leaf: how memtrace's are told from those of others, and what is left of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtrace.sources import autograd_torch_private, torch_private


class GradientHook:
    """A hook of memtrace on a gradient: told from those of others by its class."""

    __slots__ = ()


class UnsavedHook(GradientHook):
    """One that may be on while the loop hands the parameter to another process: torch warns of others."""

    __torch_unserializable__ = True


class HeardGradient:
    """Calls `hook(tensor)` each time a gradient has come for a leaf; of that nothing is left.

    It is called before the gradient is accumulated: torch goes on to call into Python for each gradient of a leaf that
    has had a hook after that (`HookSet.after_gradient`), as long as the leaf lives. FSDP2 puts its gradients on its
    DTensors by itself, and calls hooks after it alone.

    Args:
        parameter: the leaf. It is not kept.
        hook: what is called.
    """

    def __init__(self, parameter: nn.Parameter, hook: UnsavedHook) -> None:
        wraps = torch_private.is_wrapper_subclass(parameter)
        register: Any = parameter.register_post_accumulate_grad_hook if wraps else parameter.register_hook
        self._handle = register(hook)

    def close(self, parameter: nn.Parameter | None) -> None:
        """Takes it off; `parameter` is the leaf, where it is still there."""
        self._handle.remove()
        if parameter is not None:
            autograd_torch_private.forget_hooks(parameter)


class _WeakHook(GradientHook):
    """Calls a bound method as long as its object is there."""

    def __init__(self, method: Callable[[Any], None]) -> None:
        self._alive = weakref.WeakMethod(method)

    def __call__(self, argument: Any) -> None:
        if torch.compiler.is_compiling() and torch_private.one_graph():  # of compiled autograd
            return
        found = self._alive()
        if found is not None:
            found(argument)


def weakly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns what calls a bound method as long as its object is there: torch holds hooks where no collector looks.

    The form of every hook on a gradient that outlives a step and refers to something.
    """
    return _WeakHook(method)


def hears_gradient(parameter: nn.Parameter, hook: GradientHook) -> bool:
    """Returns whether a hook is on the gradient of a leaf."""
    return any(known is hook for known in autograd_torch_private.gradient_hooks(parameter))


def others_take_gradient(parameter: nn.Parameter) -> bool:
    """Returns whether others than memtrace hear of the gradient of this leaf, or use it within the backward pass."""
    hooks = autograd_torch_private.gradient_hooks(parameter)
    theirs = any(not isinstance(hook, GradientHook) for hook in hooks)
    return theirs or bool(autograd_torch_private.optimizers_in_backward((parameter,)))

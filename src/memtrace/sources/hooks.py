"""Every hook that memtrace installs, on one stack, so that all of them can be taken off again."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memtrace.sources import torch_private


class HookSet:
    """Hooks that come off together.

    Use as a context manager or call `close()`; closing twice does nothing. Only public registration calls of torch
    are used, so that what was there before is there afterwards. Hooks are left out of compiled regions: torch's
    compiler runs them outside the graph.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes every hook, the last one first."""
        self._stack.close()

    def before_forward(self, module: nn.Module, hook: Callable[..., None], *, prepend: bool = True) -> None:
        """Calls `hook(module, args, kwargs)` before each forward of the module, before or after all other hooks."""
        handle = module.register_forward_pre_hook(_ModuleHook(outside_graphs(hook)), with_kwargs=True, prepend=prepend)
        self._stack.callback(handle.remove)

    def after_forward(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Calls `hook(module, args, output)` after each forward of the module, also of one that raised."""
        handle = module.register_forward_hook(_ModuleHook(outside_graphs(hook)), always_call=True)
        self._stack.callback(handle.remove)

    def around_step(
        self, optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        """Calls `before` and `after`, each with (optimizer, args, kwargs), around each step of the optimizer.

        Always with the given object: torch names the one that was stepped, which may be a wrapper with the same hooks.
        """

        alive = weakref.ref(optimizer)

        def given(hook: Callable[..., None]) -> Callable[..., None]:
            return lambda _, args, kwargs: hook(alive(), args, kwargs)

        self._stack.callback(optimizer.register_step_pre_hook(given(before)).remove)
        self._stack.callback(optimizer.register_step_post_hook(given(after)).remove)

    def after_gradient(self, parameters: Iterable[nn.Parameter], hook: Callable[[torch.Tensor], None]) -> None:
        """Calls `hook(parameter)` each time a gradient was accumulated into `.grad`."""
        handles: list[RemovableHandle] = []
        self._stack.callback(_remove, handles)  # one callback for all: a traced step has them on for that step alone
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def callback(self, function: Callable[[], Any]) -> None:
        """Calls `function` when the set is closed."""
        self._stack.callback(function)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def outside_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns the hook as torch's compiler leaves it, and what it calls, out of a graph, where the compiler is loaded.

    Traced into the graph of a compiled module, a hook would run once instead of each time, and change the graph. The
    compiler is not loaded for that, which takes seconds: whoever has made an optimizer of torch has loaded it.
    """
    if "torch._dynamo" not in sys.modules or torch_private.is_left_out_of_graphs(hook):
        return hook
    outside: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return outside


class _ModuleHook(partial[None]):
    """A hook on a module, which no copy and no pickle of the module takes along.

    A copy is another module, that nobody has asked to be watched, and whoever loads a pickle need not have memtrace:
    both have something in this place that does nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class SavedTensorHooks:
    """Saved-tensor hooks that stay on from one call to a later one, beside hooks of the user.

    torch keeps saved-tensor hooks on a stack for each thread and applies the innermost pair only. So a pair of the
    user that is below ours is called by ours; and ours is taken off only when it is the innermost one, on the thread
    that put it on, so that the `with` block of a user never takes off the wrong pair.

    Args:
        on_pack: called with each tensor that is saved; what it returns is kept in its place, unless it is None.
        on_unpack: called with each tensor that the backward pass asks for, until it returns True.
        on_kept: called with what hooks of the user that lie below keep in place of a tensor.
    """

    def __init__(
        self,
        on_pack: Callable[[torch.Tensor], torch.Tensor | None],
        on_unpack: Callable[[torch.Tensor], bool | None],
        on_kept: Callable[[object], None],
    ) -> None:
        self.on_pack, self.on_unpack, self.on_kept = on_pack, on_unpack, on_kept
        self.listening = True
        """Whether `on_unpack` is called; set it to hear again what the backward pass asks for."""
        self._pair: _Pair | None = None
        self._thread: int | None = None

    @property
    def is_on(self) -> bool:
        """Whether the pair is on the stack."""
        return self._pair is not None

    @property
    def covers_user_hooks(self) -> bool:
        """Whether a pair of the user lies below: then ours must come off in the call that put it on."""
        return self._pair is not None and self._pair.below is not None

    def push(self) -> None:
        """Puts the pair on this thread's stack, unless it is there or such hooks are forbidden.

        The user can forbid them; inside a node of a backward pass torch would take them off again.
        """
        if self.is_on or not torch_private.saved_tensor_hooks_allowed() or torch_private.backward_is_running():
            return
        self._pair = _Pair(self, below=torch_private.saved_tensor_hooks())
        torch_private.push_saved_tensor_hooks(self._pair.pack, self._pair.unpack)
        self._thread = threading.get_ident()

    def pop(self) -> bool:
        """Takes the pair off where that is possible now; returns whether it is off.

        Inside a node of a backward pass torch would put it back.
        """
        if self._pair is None:
            return True
        if torch_private.backward_is_running() or threading.get_ident() != self._thread:
            return False
        top = torch_private.saved_tensor_hooks()
        if top is None or top[0] != self._pair.pack:
            return False
        torch_private.pop_saved_tensor_hooks()
        self._pair = self._thread = None
        return True


class _Pair:
    """One pair on the stack. Tensors that were saved through it come back through it, also when it is off again."""

    def __init__(self, hooks: SavedTensorHooks, below: torch_private.SavedTensorHooks | None) -> None:
        self._hooks = hooks
        self.below = below

    def pack(self, tensor: torch.Tensor) -> Any:
        stand_in = self._hooks.on_pack(tensor)
        if self.below is not None:
            kept = self.below[0](tensor)
            self._hooks.on_kept(kept)
            return kept
        return tensor if stand_in is None else stand_in

    def unpack(self, packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed if self.below is None else self.below[1](packed)
        if self._hooks.listening:
            self._hooks.listening = not self._hooks.on_unpack(tensor)
        return tensor

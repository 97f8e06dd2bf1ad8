"""Private calls into torch's autograd: hooks on saved tensors, nodes, backward passes, hooks on gradients.

Beside `torch_private`, and by its rules: a missing private name costs a feature, never the run, and each function says
what its caller gets then.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from memtrace.sources.torch_private import leave_out_of_graphs

SavedTensorHooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

_innermost_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""Returns the innermost pair of saved-tensor hooks; torch 2.6 cannot tell which it is."""


def saved_tensor_hooks() -> SavedTensorHooks | None:
    """Returns the innermost saved-tensor hooks of this thread; None where there are none, or nobody knows them.

    torch applies only the innermost pair: hooks of the user that lie below ours must be called by ours. Where torch
    does not tell it (2.6), it is the one whose `with` block is the only one of its kind in the process.
    """
    if _innermost_hooks is not None:
        top = _innermost_hooks(False)
        return None if top is None else (top[0], top[1])
    made = _made_hooks() if has_saved_tensor_hooks() else []
    return (made[0].pack_hook, made[0].unpack_hook) if len(made) == 1 else None


def has_saved_tensor_hooks() -> bool:
    """Returns whether this thread has saved-tensor hooks. To forbid them raises where there are some."""
    if _innermost_hooks is not None:
        return saved_tensor_hooks() is not None
    try:
        with _forbid("asked by memtrace"):
            return False
    except RuntimeError:
        return True


_forbid = contextmanager(inspect.unwrap(torch.autograd.graph.disable_saved_tensors_hooks))
"""`disable_saved_tensors_hooks` as torch has made it, also while `around_forbidding` is at work."""


def are_innermost(ours: SavedTensorHooks, below: SavedTensorHooks | None) -> bool:
    """Returns whether a pair of ours, which is on this thread's stack, is the innermost one.

    Args:
        ours: the pair.
        below: the innermost one when it was put on.
    """
    if _innermost_hooks is not None:
        top = saved_tensor_hooks()
        return top is not None and top[0] == ours[0]
    return all(below is not None and hooks.pack_hook is below[0] for hooks in _made_hooks())


def _made_hooks() -> list[Any]:
    """Returns all `saved_tensors_hooks` of the process, as long as their `with` blocks at least; some 10 ms."""
    kinds, made = [torch.autograd.graph.saved_tensors_hooks], []
    for kind in kinds:
        kinds += kind.__subclasses__()
    for found in gc.get_referrers(*kinds):  # a comprehension would be a frame that torch's compiler sees
        if isinstance(found, kinds[0]):
            made.append(found)
    return made


def around_forbidding(around: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Enters `around()` where saved-tensor hooks are about to be forbidden; returns what ends that.

    `torch.func.grad` and its kind forbid them, which raises where there are some, and torch tells nobody before. So
    another generator stands for the one inside `torch.autograd.graph.disable_saved_tensors_hooks`, and is taken out
    again. The function itself stays what it is: graphs of torch's compiler hold as long as it does. Without effect
    where the function is made in another way: then torch raises.
    """
    function: Any = torch.autograd.graph.disable_saved_tensors_hooks
    cell = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)).get("func")
    if cell is None:
        return lambda: None
    before = cell.cell_contents

    def disable_saved_tensors_hooks(error_message: str) -> Iterator[None]:
        with around():
            yield from before(error_message)

    def end() -> None:
        if cell.cell_contents is disable_saved_tensors_hooks:
            cell.cell_contents = before

    cell.cell_contents = disable_saved_tensors_hooks
    return end


def saved_tensor_hooks_allowed() -> bool:
    """Returns False inside `torch.autograd.graph.disable_saved_tensors_hooks`."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def push_saved_tensor_hooks(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
    """Makes (pack, unpack) the innermost hooks; the public context manager cannot end in another function's frame."""
    if _innermost_hooks is None:  # the step of an optimizer that is compiled may ask: torch 2.6 raises in it
        leave_out_of_graphs(_made_hooks)
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def pop_saved_tensor_hooks() -> None:
    """Removes the innermost hooks of this thread."""
    torch._C._autograd._pop_saved_tensors_default_hooks()


def tells_of_nodes() -> bool:
    """Returns whether torch tells of each node of autograd that is created: from 2.14 on."""
    return hasattr(torch._C._autograd, "_push_node_creation_hook")


def push_node_creation_hook(hook: Callable[[Any], None]) -> None:
    """Calls `hook(node)` for each node that this thread creates; the public context manager cannot end elsewhere.

    The registration goes along into the backward passes that this thread begins.
    """
    torch._C._autograd._push_node_creation_hook(hook)  # type: ignore[attr-defined]


def pop_node_creation_hook() -> None:
    """Takes off the innermost hook on the creation of nodes of this thread."""
    torch._C._autograd._pop_node_creation_hook()  # type: ignore[attr-defined]


def saved_by(node: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors that a node of autograd has saved, by its `_saved_*` attributes or a Function's own list.

    Not where hooks on saved tensors are in force: to ask for a tensor would call them.
    """
    kind = type(node)
    names = _saved_names.get(kind)
    if names is None:
        names = [name for name in dir(kind) if name.startswith("_saved_")]
        names = [name for name in names if not isinstance(getattr(node, name), (int, float, bool, str))]
        names += ["saved_tensors"] if hasattr(kind, "saved_tensors") else []
        _saved_names[kind] = names
    for name in names:
        value = getattr(node, name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (part for part in value if isinstance(part, torch.Tensor))


_GENERATORS = frozenset({"fwd_cpu_state", "fwd_device_states", "fwd_gpu_states"})
"""What `torch.utils.checkpoint` keeps of random number generators on its `ctx`, by the names of its versions."""


def kept_on(node: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors that a Function of the user has put on its `ctx`, by themselves or in plain containers.

    The states of random number generators that a checkpoint keeps are left out: the host's, whatever computes.
    """
    kept = dict(vars(node)) if isinstance(node, torch.autograd.function.FunctionCtx) else {}
    for value in (value for name, value in kept.items() if name not in _GENERATORS):
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (list, tuple, dict):
            parts = list(value.values() if type(value) is dict else value)
            yield from (part for part in parts if isinstance(part, torch.Tensor))


_saved_names: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()
"""The attributes of each type of node that hold tensors."""

current_autograd_node: Callable[[], object] = getattr(torch._C, "_current_autograd_node", lambda: None)
"""Returns the node of a backward pass that this thread is inside of; None outside, and where torch cannot tell."""

next_node: Callable[[], int] = getattr(torch._C._autograd, "_get_sequence_nr", lambda: 0)
"""Returns the number that the next node of autograd gets that this thread makes: they only grow. 0 where torch cannot
tell."""

_GATHERS = 2**63
"""From this number on nodes are those that gather a parameter's gradient, which have no order."""


def running_node() -> int | None:
    """Returns the number of the node whose backward pass this thread is inside of.

    None outside of all, inside of one that gathers a parameter's gradient, and where torch cannot tell.
    """
    node = current_autograd_node()
    if node is None:
        return None
    number: int = getattr(node, "_sequence_nr", lambda: _GATHERS)()
    return number if number < _GATHERS else None


_at_an_end: set[int] = set()
"""The threads that are inside a call from `after_backward`."""


def backward_is_running() -> bool:
    """Returns whether this thread is inside a node of a backward pass or a call from `after_backward`.

    False where torch cannot tell. torch saves the thread's profiler and saved-tensor hooks before each node, and before
    the callbacks at the end of the pass, and puts them back afterwards: what is switched on or off in between is
    undone.
    """
    return current_autograd_node() is not None or (bool(_at_an_end) and threading.get_ident() in _at_an_end)


def compiles_backward() -> bool:
    """Returns whether torch's compiler takes in backward passes now (compiled autograd).

    Inside of such a one there is no node, and saved-tensor hooks are put back all the same. False where torch has
    changed: hooks that were taken off there stay on.
    """
    return bool(getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False))


def after_backward(callback: Callable[[], None], *, last: bool = False) -> bool:
    """Calls `callback()` once, when the backward pass that this thread is inside of has ended without an error.

    Engines end their own work so. No public hook tells of that end.

    Args:
        callback: what to call.
        last: whether after what everybody else has asked to be called then, and not in the order of asking.

    Returns:
        False outside of a backward pass, and where torch has changed: nothing is called then.
    """
    queue = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback", None)
    if queue is None or current_autograd_node() is None:
        return False

    def end() -> None:
        thread = threading.get_ident()
        _at_an_end.add(thread)
        try:
            callback()
        finally:
            _at_an_end.discard(thread)

    queue((lambda: queue(end)) if last else end)
    return True


def optimizers_in_backward(parameters: Iterable[torch.Tensor]) -> list[Any]:
    """Returns the optimizers that torch steps inside the backward pass, one or more for each of these parameters.

    `torch.distributed.optim._apply_optimizer_in_backward` keeps them on the parameters, where no public call finds them
    without a module. None where torch has changed: whoever has the optimizers hands them over.
    """
    if "torch.distributed.optim.apply_optimizer_in_backward" not in sys.modules:
        return []
    return [one for parameter in parameters for one in getattr(parameter, "_in_backward_optimizers", ())]


def gradient_hooks(parameter: torch.Tensor) -> list[Any]:
    """Returns the hooks on the gradient of this leaf, before and after it is accumulated.

    No public call tells of hooks. None where torch has changed.
    """
    found = (getattr(parameter, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    return [hook for hooks in found if hooks for hook in hooks.values()]


def forget_hooks(parameter: torch.Tensor) -> None:
    """Lets torch forget that there were hooks before the accumulation of this leaf's gradient, where none is left.

    It calls into Python for them until then. Without effect inside a backward pass, which may be at them, and where
    torch has changed.
    """
    hooks = getattr(parameter, "_backward_hooks", None)
    if hooks is not None and not hooks and not backward_is_running():
        parameter._backward_hooks = None


def call_first(parameter: torch.Tensor, number: int) -> None:
    """Lets the hook with this number be the first that is called after a gradient was accumulated into this leaf.

    The others keep their order. Where torch has changed the hook stays the last one.
    """
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    if isinstance(hooks, dict) and len(hooks) > 1 and number in hooks:
        others = [(key, hook) for key, hook in hooks.items() if key != number]
        for key, _ in others:  # torch calls them in the order of the dictionary below, which `move_to_end` leaves alone
            del hooks[key]
        hooks.update(others)

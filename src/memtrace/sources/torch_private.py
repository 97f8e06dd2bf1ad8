"""Every private call into torch that memtrace makes, each with its reason and what happens where it is missing.

Nothing else in the package touches `torch._C` or an underscored name of torch, but `recording_torch_private` for what
records, `engines_torch_private` for FSDP and DDP, and `torch_fake` for tensors without memory. A missing private name
costs a feature, never the run: each function says what its caller gets then.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

Held = TypeVar("Held", bound=torch.Tensor | torch.UntypedStorage)

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
        with torch.autograd.graph.disable_saved_tensors_hooks("asked by memtrace"):
            return False
    except RuntimeError:
        return True


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
    kinds = [torch.autograd.graph.saved_tensors_hooks]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [found for found in gc.get_referrers(*kinds) if isinstance(found, kinds[0])]


def saved_tensor_hooks_allowed() -> bool:
    """Returns False inside `torch.autograd.graph.disable_saved_tensors_hooks`."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def push_saved_tensor_hooks(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
    """Makes (pack, unpack) the innermost hooks; the public context manager cannot end in another function's frame."""
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


def kept_on(node: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors that a Function of the user has put on its `ctx`, by themselves or in plain containers."""
    for value in list(vars(node).values()) if isinstance(node, torch.autograd.function.FunctionCtx) else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (list, tuple, dict):
            parts = list(value.values() if type(value) is dict else value)
            yield from (part for part in parts if isinstance(part, torch.Tensor))


_saved_names: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()
"""The attributes of each type of node that hold tensors."""


def alive(reference: weakref.ref[Held]) -> Held | None:
    """Returns the tensor or the storage that a weak reference refers to; None where it is gone.

    Where nothing in Python refers to it, the Python object belongs to C++. Up to torch 2.8 at least whoever takes a
    reference to it then must say so: else it is freed in use. That of a storage of which somebody has a weak reference
    of C++ (`StorageWeakRef`) outlives it there, and must not be touched.
    """
    found = reference()
    if found is None or (isinstance(found, torch.UntypedStorage) and not _strong_references(found._cdata)):
        return None
    found._fix_weakref()  # type: ignore[union-attr]
    return found


_strong_references: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", lambda _: 1)
"""Returns how many references of C++ a storage has, by its `_cdata`; 1 where torch cannot tell."""


def current_accelerator() -> torch.device | None:
    """Returns the kind of device that this build of torch is for beside the CPU; None where there is none.

    torch 2.6 raises where the machine has no such device.
    """
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:
        return None


current_autograd_node: Callable[[], object] = getattr(torch._C, "_current_autograd_node", lambda: None)
"""Returns the node of a backward pass that this thread is inside of; None outside, and where torch cannot tell."""


_at_an_end: set[int] = set()
"""The threads that are inside a call from `after_backward`."""


def backward_is_running() -> bool:
    """Returns whether this thread is inside a node of a backward pass or a call from `after_backward`.

    False where torch cannot tell. torch saves the thread's profiler and saved-tensor hooks before each node, and before
    the callbacks at the end of the pass, and puts them back afterwards: what is switched on or off in between is
    undone.
    """
    return current_autograd_node() is not None or threading.get_ident() in _at_an_end


def after_backward(callback: Callable[[], None]) -> bool:
    """Calls `callback()` once, when the backward pass that this thread is inside of has ended without an error.

    Engines of torch end their own work so. No public hook tells of that end.

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

    queue(end)
    return True


def optimizers_in_backward(parameters: Iterable[torch.Tensor]) -> list[Any]:
    """Returns the optimizers that torch steps inside the backward pass, one or more for each of these parameters.

    `torch.distributed.optim._apply_optimizer_in_backward` keeps them on the parameters, where no public call finds them
    without a module. None where torch has changed: whoever has the optimizers hands them over.
    """
    if "torch.distributed.optim.apply_optimizer_in_backward" not in sys.modules:
        return []
    return [one for parameter in parameters for one in getattr(parameter, "_in_backward_optimizers", ())]


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Returns whether somebody has a hook on the gradient of this leaf, before or after it is accumulated.

    No public call tells of hooks. False where torch has changed.
    """
    return bool(
        getattr(parameter, "_backward_hooks", None)
        or getattr(parameter, "_post_accumulate_grad_hooks", None)
        or optimizers_in_backward((parameter,))
    )


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


frame_compiler: Callable[[], object] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", lambda: True
)
"""Returns None where torch's compiler is not at work on this thread; else something, also where torch cannot tell."""


def runs_without_memory() -> bool:
    """Returns whether modules run on tensors without memory now: for `torch.export` or a graph of `torch.fx`.

    False where torch has changed.
    """
    mode_of, keys = getattr(torch._C, "_get_dispatch_mode", None), getattr(torch._C, "_TorchDispatchModeKey", None)
    if mode_of is None or keys is None:
        return False
    return mode_of(keys.FAKE) is not None or mode_of(keys.PROXY) is not None


is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
"""Returns whether `torch.jit.trace` is at work; `torch.jit.is_tracing` does so in four times the time."""


def one_graph() -> bool:
    """Returns, while torch's compiler is at work, whether the graph must be whole: no call can be left out of it then.

    The compiler calls it and takes the answer for a constant. False where torch has changed: the graph is then broken
    in two, or where it must be whole the compiler raises.
    """
    translator = getattr(sys.modules.get("torch._dynamo.symbolic_convert"), "InstructionTranslator", None)
    try:
        return bool(translator.current_tx().one_graph)  # type: ignore[union-attr]
    except AttributeError:
        return False


# What torch.compiler.assume_constant_result does, without loading the compiler.
one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leave_out_of_graphs(function: Callable[..., Any]) -> None:
    """Makes torch's compiler, where it is loaded, neither trace into calls of this function nor compile it by itself.

    `torch.compiler.disable` does so by a call around it that asks the compiler each time. What the function calls is
    not left out: it must not call anything in Python while `frame_compiler()` is there. Without effect where torch
    has changed.
    """
    skip_code = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)
        function._torchdynamo_disable = True  # type: ignore[attr-defined]


def is_left_out_of_graphs(function: Callable[..., Any]) -> bool:
    """Returns whether `leave_out_of_graphs`, or torch's own way to the same, has had its effect."""
    return bool(getattr(function, "_torchdynamo_disable", False))


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Returns whether the tensor stands for zeros that take no memory: a tangent of forward-mode derivatives."""
    probe = getattr(tensor, "_is_zerotensor", None)
    return probe is not None and bool(probe())


def under_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that lies below what the transforms of `torch.func` have put around it, which has no storage.

    The tensor itself where there are none, and where torch has changed.
    """
    functorch = getattr(torch._C, "_functorch", None)
    is_wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    while is_wrapped is not None and is_wrapped(tensor):
        tensor = functorch.get_unwrapped(tensor)  # type: ignore[union-attr]
    return tensor


def is_wrapper_subclass(tensor: torch.Tensor) -> bool:
    """Returns whether the tensor only wraps other tensors (DTensor, quantised tensors) that hold the storage."""
    return hasattr(type(tensor), "__tensor_flatten__")


def sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the dense tensors that hold a sparse tensor's storage; the public accessors need it coalesced."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def held_by(
    module: torch.nn.Module,
) -> tuple[Mapping[str, torch.nn.Parameter | None], Mapping[str, torch.Tensor | None]]:
    """Returns the parameters and the buffers of a module itself by name, None among them.

    The public calls take ten times as long; they are asked where torch has changed.
    """
    try:
        return module._parameters, module._buffers
    except AttributeError:
        return dict(module.named_parameters(recurse=False)), dict(module.named_buffers(recurse=False))


def identities(modules: Iterable[torch.nn.Module | None]) -> list[int]:
    """Returns the identities of what these modules hold themselves, in order; 0 stands for a module that is gone."""
    found: list[int] = []
    for module in modules:
        if module is None:
            found.append(0)
            continue
        parameters, buffers = held_by(module)
        if parameters:
            found += map(id, parameters.values())
        if buffers:
            found += map(id, buffers.values())
    return found


def holdings(modules: Iterable[torch.nn.Module | None]) -> list[int]:
    """Returns what is another list where one of these modules is gone, or holds another module or another storage.

    Addresses of plain tensors, identities of all else. It is run in each step: what a loop does for each module is
    little, and most of what it takes is the processor's wait for objects that the step has not touched for long. Empty
    where torch has changed: then nothing is told.
    """
    children: list[torch.nn.Module | None] = []
    tensors: list[torch.Tensor | None] = []
    parameter, plain = torch.nn.Parameter, torch.Tensor
    try:
        for module in modules:
            if module is None:
                children.append(None)
                continue
            if modules_in_it := module._modules:
                children += modules_in_it.values()
            if parameters := module._parameters:
                tensors += parameters.values()
            if buffers := module._buffers:
                tensors += buffers.values()
        addresses = [
            tensor.data_ptr() if type(tensor) is parameter or type(tensor) is plain else id(tensor)
            for tensor in tensors
        ]
    except (AttributeError, RuntimeError):  # a layout without an address, too
        return []
    return [*map(id, children), *addresses]

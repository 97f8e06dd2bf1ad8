"""Every private call into torch that memtrace makes, each with its reason and what happens where it is missing.

Nothing else in the package touches `torch._C` or an underscored name of torch, but `recording_torch_private` for what
records, `autograd_torch_private` for autograd, `engines_torch_private` for FSDP and DDP, and `torch_fake` for tensors
without memory. A missing private name costs a feature, never the run: each function says what its caller gets then.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from inspect import currentframe
from operator import attrgetter
from types import ModuleType
from typing import Any, TypeVar

import torch

Held = TypeVar("Held", bound=torch.Tensor | torch.UntypedStorage)


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


_dispatch_mode = getattr(torch._C, "_get_dispatch_mode", None)
_mode_keys = getattr(torch._C, "_TorchDispatchModeKey", None)


def runs_without_memory() -> bool:
    """Returns whether modules run on tensors without memory now: for `torch.export` or a graph of `torch.fx`.

    False where torch has changed.
    """
    if _dispatch_mode is None or _mode_keys is None:
        return False
    return _dispatch_mode(_mode_keys.FAKE) is not None or _dispatch_mode(_mode_keys.PROXY) is not None


is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
"""Returns whether `torch.jit.trace` is at work; `torch.jit.is_tracing` does so in four times the time."""


def around_what_takes_no_hooks(around: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    """Enters `around()` while torch makes something of modules that must have no hooks; returns what ends that.

    Torch has no place to be told of it before it looks at the hooks. So it is put around the one function that all ways
    of scripting a module come to, and around `torch.cuda.make_graphed_callables`, and taken off again unless somebody
    has put another one in its place. Without effect where torch has changed, or a script has taken the function by its
    name before: then torch raises on hooks.
    """
    recursive, graphs = getattr(torch.jit, "_recursive", None), getattr(torch.cuda, "graphs", None)
    ends: list[Callable[[], None]] = []

    def end() -> None:
        for one in ends:
            one()

    with ExitStack() as half_done:  # where Ctrl-C comes into it
        half_done.callback(end)
        ends.append(_put_around(around, (recursive,), "create_script_module"))
        ends.append(_put_around(around, (torch.cuda, graphs), "make_graphed_callables"))
        half_done.pop_all()
    return end


def _put_around(
    around: Callable[[], AbstractContextManager[Any]], modules: tuple[ModuleType | None, ...], name: str
) -> Callable[[], None]:
    before: Callable[..., Any] | None = getattr(modules[0], name, None)
    if before is None:
        return lambda: None

    @wraps(before)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with around():
            return before(*args, **kwargs)

    def end() -> None:
        for module in modules:
            if getattr(module, name, None) is inside:
                setattr(module, name, before)

    for module in modules:
        if getattr(module, name, None) is before:
            setattr(module, name, inside)
    return end


def around_compilation(around: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Enters `around()` while torch's compiler makes a graph of something; returns what ends that.

    Without effect where the compiler is not loaded, or torch has changed.
    """
    handler = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
    entered = ExitStack()

    def begins(*_: object) -> None:
        entered.enter_context(around())

    def ends(*_: object) -> None:
        entered.close()

    try:
        registered = ((handler.start_callbacks, begins), (handler.end_callbacks, ends))  # type: ignore[union-attr]
        for callbacks, callback in registered:
            callbacks.append(callback)
    except AttributeError:
        return lambda: None

    def end() -> None:
        for callbacks, callback in registered:
            if callback in callbacks:  # `torch._dynamo.reset()` forgets them
                callbacks.remove(callback)
        entered.close()

    return end


_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FORWARD_HOOKS_MARKS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def remove_module_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
    """Removes a hook on forward passes from a module of which nobody has the handle, as from a copy."""
    for name in _FORWARD_HOOKS:
        hooks: dict[int, Any] = getattr(module, name, {})
        for number in [number for number, known in hooks.items() if known is hook]:
            del hooks[number]
            for marks in _FORWARD_HOOKS_MARKS:
                getattr(module, marks, {}).pop(number, None)


_STEP = getattr(torch.optim.Optimizer, "profile_hook_step", lambda step: step)(lambda: None).__code__
"""What torch has put around the `step` of each optimizer, and calls the hooks in."""


def is_stepping() -> bool:
    """Returns whether this thread is inside a step of an optimizer: torch goes through its hooks, and none may leave.

    False where torch has changed: what is taken off there raises, as it does without this.
    """
    frame = currentframe()
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    return frame is not None


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
    not left out. Without effect where torch has changed.
    """
    skip_code = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    code = getattr(function, "__code__", None)  # none where it is written in C
    if skip_code is not None and code is not None:
        skip_code(code)
        function._torchdynamo_disable = True  # type: ignore[attr-defined]


def not_compiled_alone(function: Callable[..., Any]) -> None:
    """Makes torch's compiler, where it is loaded, not compile calls of this function by itself; inside a graph it may.

    Before torch 2.7 `torch.export` compiles the hooks of a module beside its forward pass, and takes the graph of one
    for a second graph of the module, which it refuses. Without effect where torch has changed.
    """
    skip_code = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    code = getattr(function, "__code__", None)  # none where it is written in C
    if skip_code is not None and code is not None:
        skip_code(code)


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


own_parameters: Callable[[torch.nn.Module], Any] = (
    attrgetter("_parameters")
    if hasattr(torch.nn.Module(), "_parameters")
    else lambda module: dict(module.named_parameters(recurse=False))
)
"""Returns the parameters of a module itself by name, None among them, without a call of Python."""


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

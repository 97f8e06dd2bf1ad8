"""What autograd saves for the backward pass, heard from one call to a later one, beside hooks of the user.

A saved tensor is kept exactly as long as autograd keeps it without memtrace. What is kept in its place has no gradient
function: a node that keeps a tensor of its own is a cycle through C++ that nobody frees.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch.torch_version import TorchVersion

from memtrace.sources import autograd_torch_private
from memtrace.sources.asides import FORBIDDING
from memtrace.sources.created_nodes import CreatedNodes

OnSaved = Callable[[torch.Tensor], torch.Tensor | None]
"""Called with each tensor that is saved; what it returns is kept in its place, unless it is None."""
OnAsked = Callable[[torch.Tensor | None], bool | None]
"""Called with each tensor that the backward pass asks for, until it returns True."""
OnKept = Callable[[object], None]
"""Called with what hooks of the user that lie below keep in place of a tensor."""


_BACKWARD = re.compile(r"Backward\d*$")
_MOST_NODES = 100_000


class SavedTensors(Protocol):
    """How a window learns what autograd saves: by `SavedTensorHooks` or by `CreatedNodes`."""

    listening: bool
    """Whether the backward pass is told of; set it to hear of the next one."""

    @property
    def is_on(self) -> bool:
        """Whether it hears what this thread does."""

    @property
    def covers_user_hooks(self) -> bool:
        """Whether it must come off in the call that put it on."""

    def push(self) -> None:
        """Hears what this thread does, where that is allowed."""

    def pop(self) -> bool:
        """Ends that where it is possible now; returns whether it has ended."""

    def forward_ended(self, output: Iterable[torch.Tensor]) -> None:
        """Takes in the tensors that the forward pass returned."""

    def forget(self) -> None:
        """Calls nobody from now on, and holds nobody."""


def saved_tensors(on_saved: OnSaved, on_asked: OnAsked, on_kept: OnKept, *, replaces: bool) -> SavedTensors:
    """Returns the way that this version of torch has.

    Nodes are asked where torch tells of them (2.14): that changes nothing of how long a tensor lives, forbids nothing,
    and leaves torch's check of changes in place alone.

    Args:
        on_saved: see `OnSaved`.
        on_asked: see `OnAsked`.
        on_kept: see `OnKept`.
        replaces: whether `on_saved` may return a tensor, and `on_asked` must hear of every tensor: then hooks it is.
    """
    if autograd_torch_private.tells_of_nodes() and not replaces:
        return CreatedNodes(on_saved, on_asked)
    return SavedTensorHooks(on_saved, on_asked, on_kept)


class SavedTensorHooks:
    """A pair of saved-tensor hooks that stays on from one call to a later one.

    torch keeps saved-tensor hooks on a stack for each thread and applies the innermost pair only. So a pair of the
    user that is below ours is called by ours; and ours is taken off only when it is the innermost one, on the thread
    that put it on, so that the `with` block of a user never takes off the wrong pair.

    It steps aside while such hooks are forbidden, as inside `torch.func.grad`: that is known by its life.

    How a pair ends: by `pop`; with the last tensor that was saved through it, where that dies outside of a backward
    pass (a loss that was thrown away, a step that failed); with its thread.

    Args:
        on_saved: see `OnSaved`.
        on_asked: see `OnAsked`.
        on_kept: see `OnKept`.
    """

    def __init__(self, on_saved: OnSaved, on_asked: OnAsked, on_kept: OnKept) -> None:
        self.on_saved, self.on_asked, self.on_kept = on_saved, on_asked, on_kept
        self.listening = True
        """Whether `on_asked` is called; set it to hear again what the backward pass asks for."""
        self._of_thread = threading.local()

    @property
    def is_on(self) -> bool:
        """Whether a pair is on the stack of this thread."""
        return self._pair is not None

    @property
    def covers_user_hooks(self) -> bool:
        """Whether a pair of the user lies below: then ours must come off in the call that put it on."""
        pair = self._pair
        return pair is not None and pair.below is not None

    def forward_ended(self, output: Iterable[torch.Tensor]) -> None:
        """Hears of what is kept on the `ctx` of a Function, and lets the pair go with the last tensor that was saved
        through it, from now on."""
        pair = self._pair
        if pair is not None:
            for tensor in _kept_below(output):
                self.on_saved(tensor)
            pair.forward_ended()

    def forget(self) -> None:
        """Calls nobody from now on, and holds nobody."""
        self.on_saved = self.on_asked = self.on_kept = _nothing

    @property
    def _pair(self) -> _Pair | None:
        owner = getattr(self._of_thread, "owner", None)
        return owner.pair if owner is not None and owner.pair.is_on else None

    def push(self) -> None:
        """Puts a pair on this thread's stack, unless it is there or such hooks are forbidden.

        The user can forbid them; inside a node of a backward pass torch would take them off again.
        """
        if (pair := self._pair) is not None:
            pair.in_forward = True
            return
        if not autograd_torch_private.saved_tensor_hooks_allowed() or autograd_torch_private.backward_is_running():
            return
        below = autograd_torch_private.saved_tensor_hooks()
        if below is None and autograd_torch_private.has_saved_tensor_hooks():
            return  # nobody knows which hooks of the user ours would have to call
        pair = _Pair(self, below=below)
        self._of_thread.owner = _Owner(pair)  # before anything is on: then somebody answers for it
        autograd_torch_private.push_saved_tensor_hooks(pair.pack, pair.unpack)
        pair.is_on = True
        pair.leaves = FORBIDDING.subscribe(pair.aside)

    def pop(self) -> bool:
        """Takes this thread's pair off where that is possible now; returns whether it is off.

        Inside a node of a backward pass torch would put it back.
        """
        owner = getattr(self._of_thread, "owner", None)
        if owner is None:
            return True
        if not owner.pair.pop():
            return False
        del self._of_thread.owner
        return True


def _kept_below(output: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the tensors that Functions of the user keep on their `ctx` below what a forward pass has returned.

    Costs about 1 us for each node of the graph, of which no more than `_MOST_NODES` are looked at.
    """
    waiting = [node for tensor in output if (node := tensor.grad_fn) is not None]
    known = {*waiting}
    while waiting and len(known) < _MOST_NODES:
        node = waiting.pop()
        yield from autograd_torch_private.kept_on(node)
        for below, _ in node.next_functions:
            if below is not None and below not in known:
                known.add(below)
                waiting.append(below)


def _nothing(_: object) -> None:
    """Stands for what a pair that nobody listens to any more calls."""


class _Owner:
    """Who answers for the pair on the stack of one thread: let go when the pair is off, or by the thread's end."""

    __slots__ = ("pair",)

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair

    def __del__(self) -> None:
        if hasattr(self, "pair"):  # else a fault has come before it was made
            self.pair.pop()


class _Graph:
    """Stands for all tensors that are kept by one pair: each of them refers to it, and nothing else does for long."""

    __slots__ = ("__weakref__",)


class _Kept(NamedTuple):
    """What is kept in place of a saved tensor."""

    tensor: torch.Tensor
    version: int | None
    """How often the tensor had been changed in place when it was saved; None where that is not compared."""
    output_nr: int
    made_by: str | None
    """Name of the gradient function of the saved tensor."""
    graph: _Graph


class _Pair:
    """One pair on the stack. Tensors that were saved through it come back through it, also when it is off again."""

    def __init__(self, hooks: SavedTensorHooks, below: autograd_torch_private.SavedTensorHooks | None) -> None:
        self._hooks = weakref.ref(hooks)
        """Weakly: torch's stack and its graphs hold this pair where Python's collector cannot look."""
        self.below = below
        self._thread = threading.get_ident()
        self._graph: weakref.ref[_Graph] | None = None
        self.is_on = False
        self.leaves: Callable[[], None] = lambda: None
        """Ends that it is put aside where it must not be on."""
        self._is_aside = False
        self.in_forward = True
        """Whether the forward pass is at work: what it has saved so far may go, and more will come."""

    def forward_ended(self) -> None:
        """Goes with the last tensor that was saved, from now on."""
        self.in_forward = False
        if self._graph is not None and self._graph() is None:
            self.pop()

    def pop(self) -> bool:
        """Takes the pair off; returns whether it is off."""
        if self.is_on:
            if not self._is_aside:
                if autograd_torch_private.backward_is_running() or not self._can_be_popped:
                    return False
                autograd_torch_private.pop_saved_tensor_hooks()
            elif threading.get_ident() != self._thread:
                return False
            self.is_on = False
        self.leaves()  # also where Ctrl-C has kept it from that
        return True

    @property
    def _can_be_popped(self) -> bool:
        on_its_thread = threading.get_ident() == self._thread
        return on_its_thread and autograd_torch_private.are_innermost((self.pack, self.unpack), self.below)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the stack of this thread, also inside a backward pass, and goes on it again if it is still to be on.

        Nothing where it is not the innermost pair there. On another thread, which has a stack of its own, it does not
        come back: of several compilations at once torch tells of the end of the last, wherever that is.
        """
        if not self.is_on or self._is_aside or not self._can_be_popped:
            yield
            return
        autograd_torch_private.pop_saved_tensor_hooks()
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False
            if threading.get_ident() != self._thread:
                self.is_on = False
                self.leaves()
            elif self.is_on:
                autograd_torch_private.push_saved_tensor_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> Any:
        hooks = self._hooks()
        stand_in = None if hooks is None else hooks.on_saved(tensor)
        if self.below is not None:
            kept = self.below[0](tensor)
            if hooks is not None:
                hooks.on_kept(kept)
            return kept
        graph = None if self._graph is None else self._graph()
        if graph is None:
            graph = _Graph()
            self._graph = weakref.ref(graph, self._forgotten)
        if stand_in is not None:
            return _Kept(stand_in, None, 0, None, graph)
        made_by = tensor.grad_fn
        if made_by is None:
            return _Kept(tensor, tensor._version, 0, None, graph)
        return _Kept(tensor.detach(), tensor._version, tensor.output_nr, made_by.name(), graph)

    def unpack(self, packed: Any) -> torch.Tensor:
        if self.below is not None:
            tensor: torch.Tensor = self.below[1](packed)
        else:
            tensor = packed.tensor
        if torch.compiler.is_compiling():  # of compiled autograd: there a version is no number, and nothing is heard
            return tensor
        if self.below is None and packed.version is not None and tensor._version != packed.version:
            raise RuntimeError(_changed_in_place(packed))
        hooks = self._hooks()
        if hooks is not None and hooks.listening:
            hooks.listening = not hooks.on_asked(tensor)
        return tensor

    def _forgotten(self, _: object) -> None:
        """Takes the pair off when nothing that was saved through it is left: its forward pass led to nothing."""
        if not self.in_forward and not autograd_torch_private.compiles_backward():
            self.pop()


_CHECK_NAN = "" if TorchVersion(torch.__version__) < TorchVersion("2.11") else ", check_nan=False"
"""A part of torch's hint, which it has said since 2.11."""


def _changed_in_place(kept: _Kept) -> str:
    """Returns what torch says where a saved tensor was changed in place: beside hooks it does not compare versions."""
    tensor = kept.tensor
    sizes = tensor._nested_tensor_size() if tensor.is_nested and tensor.layout is torch.strided else list(tensor.shape)
    maker = kept.made_by if kept.made_by is None or _names_in_full() else _BACKWARD.sub("", kept.made_by)
    origin = "" if maker is None else f", which is output {kept.output_nr} of {maker},"
    hint = (
        "the backtrace further above shows the operation that failed to compute its gradient. The variable in question "
        "was changed in there or anywhere later. Good luck!"
        if torch.is_anomaly_enabled()
        else "enable anomaly detection to find the operation that failed to compute its gradient, with "
        f"torch.autograd.set_detect_anomaly(True{_CHECK_NAN})."
    )
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {sizes}]{origin} is at version {tensor._version}; "
        f"expected version {kept.version} instead. Hint: {hint}"
    )


@cache
def _names_in_full() -> bool:
    """Returns whether torch names the type of a gradient function there, as `ExpBackward0`: so it does up to 2.11.

    It is made to say it, on a thread without hooks.
    """
    said: list[str] = []

    def change_in_place() -> None:
        result = torch.ones(1, requires_grad=True).exp()
        result.mul_(2)
        try:
            result.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=change_in_place)
    thread.start()
    thread.join()
    return any("of ExpBackward" in message for message in said)

"""What autograd saves, asked of the nodes that it creates: for torch 2.14 and later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch

from memtrace.sources import autograd_torch_private
from memtrace.sources.gradient_hooks import weakly

_MOST_OUTPUTS = 16
"""Tensors in the output of a forward pass that are asked for their nodes."""


class CreatedNodes:
    """Hears of each node of autograd from one call to a later one, and asks it what it has saved.

    Nodes that are created beside hooks of the user on saved tensors are not asked: that would call their hooks, and a
    checkpoint would run its layer again. The beginning of the backward pass is told by the nodes of what the model's
    forward pass returns.

    How it ends: by `pop`, or with its thread.

    Args:
        on_saved: called with each tensor that is saved; what it returns is not looked at.
        on_asked: called when a backward pass begins, until it returns True.
    """

    covers_user_hooks = False

    def __init__(
        self, on_saved: Callable[[torch.Tensor], object], on_asked: Callable[[torch.Tensor | None], bool | None]
    ) -> None:
        self._on_saved, self._on_asked = on_saved, on_asked
        self.listening = True
        """Whether `on_asked` is called; set it to hear the next backward pass."""
        self._of_thread = threading.local()

    @property
    def is_on(self) -> bool:
        """Whether this thread's nodes are heard of."""
        owner = getattr(self._of_thread, "owner", None)
        return owner is not None and owner.is_on

    def push(self) -> None:
        """Hears of this thread's nodes from now on; not from inside a backward pass, where it would not last."""
        if not self.is_on and not autograd_torch_private.backward_is_running():
            self._of_thread.owner = owner = _Owner()  # before anything is on: then somebody answers for it
            autograd_torch_private.push_node_creation_hook(weakly(self._created))
            owner.is_on = True

    def pop(self) -> bool:
        """Hears of this thread's nodes no more, where that is possible now; returns whether it is so."""
        owner = getattr(self._of_thread, "owner", None)
        if owner is None:
            return True
        if not owner.pop():
            return False
        del self._of_thread.owner
        return True

    def forward_ended(self, output: Iterable[torch.Tensor]) -> None:
        """Learns from the nodes of the tensors that a forward pass returned when their backward pass begins."""
        made_by = (tensor.grad_fn for tensor in islice(output, _MOST_OUTPUTS))
        nodes = {id(node): node for node in made_by if node is not None}
        for node in nodes.values():
            node.register_prehook(weakly(self._begins))

    def forget(self) -> None:
        """Calls nobody from now on, and holds nobody."""
        self._on_saved = self._on_asked = _nothing

    def _created(self, node: Any) -> None:
        for tensor in autograd_torch_private.kept_on(node):
            self._on_saved(tensor)
        if autograd_torch_private.saved_tensor_hooks() is None:
            for tensor in autograd_torch_private.saved_by(node):
                self._on_saved(tensor)

    def _begins(self, _: object) -> None:
        if self.listening:
            self.listening = not self._on_asked(None)


class _Owner:
    """Who answers for the hook of one thread: let go when the hook is off, or by the thread's end."""

    __slots__ = ("_thread", "is_on")

    def __init__(self) -> None:
        self.is_on = False
        self._thread = threading.get_ident()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):  # else a fault has come before it was made
            self.pop()

    def pop(self) -> bool:
        """Takes the hook off; returns whether it is off."""
        if self.is_on and not autograd_torch_private.backward_is_running() and threading.get_ident() == self._thread:
            autograd_torch_private.pop_node_creation_hook()
            self.is_on = False
        return not self.is_on


def _nothing(_: object) -> None:
    """Stands for what is called once nobody listens any more."""

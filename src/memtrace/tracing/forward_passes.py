"""Which calls of a model are forward passes of its training, on the device that is watched."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from memtrace.attribution.inputs import batch_tensors
from memtrace.sources.autograd_torch_private import backward_is_running


class ForwardPasses:
    """Tells the forward passes of a training from other calls of the model and of what is inside it.

    Args:
        model: the module that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._recomputes = False
        """Whether the model is called inside the backward pass: by a reentrant checkpoint around all of it."""
        self._caller: Callable[[], threading.Thread | None] = lambda: None
        """The thread of the last forward pass. Weakly: it may have what it has made as an attribute."""
        self._several = False

    def is_training(self, module: nn.Module) -> bool:
        """Whether a call of the module, at work now, is one of a forward pass of the step, and no evaluation.

        A reentrant checkpoint around the whole model calls it twice: without gradients, and again inside the backward
        pass, which tells that the first of the two calls is the forward pass.
        """
        if backward_is_running():
            self._recomputes = self._recomputes or (module is self._model and torch.is_grad_enabled())
            return False
        return torch.is_grad_enabled() or (self._recomputes and module.training)

    def on_several_threads(self) -> bool:
        """Notes a forward pass of the step on this thread; returns whether threads have trained the model side by side.

        From then on, no saved-tensor hooks are put on: torch raises where another thread changes a parameter while a
        hook has it.
        """
        caller, here = self._caller(), threading.current_thread()
        if caller is not here:
            self._several |= caller is not None and caller.is_alive()
            self._caller = weakref.ref(here)
        return self._several

    def is_elsewhere(self, module: nn.Module, tensors: object, device: torch.device) -> bool:
        """Whether the module is a replica of the model on another device: `nn.DataParallel` gives each a thread.

        Args:
            module: what is called.
            tensors: what it was called with, or what it returns.
            device: the one that is watched.
        """
        first = None if module is self._model else next(batch_tensors(tensors), None)
        return first is not None and first.device != device

"""What a model holds, from one walk over its modules: for whatever asks for its parameters until the next walk."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from memtrace.attribution.models.quantised import is_packed, packed_tensors
from memtrace.sources.torch_private import alive, held_by, holdings


class Held:
    """The parameters and buffers of some modules, each once, in the order in which the model lists them.

    They are held weakly: what the model lets go is let go. A walk takes about 0.5 us a module and a tensor.

    Args:
        modules: a model's modules, each once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        parameters: dict[int, nn.Parameter] = {}
        buffers: dict[int, torch.Tensor] = {}
        packed: dict[int, torch.Tensor] = {}
        for module in modules:
            own_parameters, own_buffers = held_by(module)
            quantised = False
            for parameter in own_parameters:
                if parameter is not None:
                    parameters[id(parameter)] = parameter
                    quantised = quantised or (not parameter.requires_grad and is_packed(parameter))
            for buffer in own_buffers:
                if buffer is not None:
                    buffers[id(buffer)] = buffer
                    quantised = quantised or is_packed(buffer)
            if quantised:
                packed.update((id(tensor), tensor) for tensor in packed_tensors(module))
        self._parameters: list[weakref.ref[nn.Parameter]] = [
            weakref.ref(parameter) for parameter in parameters.values()
        ]
        self._buffers: list[weakref.ref[torch.Tensor]] = [weakref.ref(buffer) for buffer in buffers.values()]
        self._packed: list[weakref.ref[torch.Tensor]] = [weakref.ref(tensor) for tensor in packed.values()]
        self._modules = [weakref.ref(module) for module in modules]
        self._looked = self._look()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is still there. Where something has gone, the model may have got another in its place."""
        return len(self.parameters()) == len(self._parameters) and len(self.buffers()) == len(self._buffers)

    @property
    def is_as_walked(self) -> bool:
        """Whether the modules hold the same modules and the same storages as when they were walked over.

        It goes through all of them, which is most of what a counted step costs where it is asked.
        """
        return self._looked == self._look()

    def _look(self) -> list[int]:
        return holdings([weak() for weak in self._modules])

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are still there."""
        return [parameter for weak in self._parameters if (parameter := alive(weak)) is not None]

    def buffers(self) -> list[torch.Tensor]:
        """Returns the buffers that are still there."""
        return [buffer for weak in self._buffers if (buffer := alive(weak)) is not None]

    def packed(self) -> list[torch.Tensor]:
        """Returns what quantised layers keep of their weights in other places than parameters, buffers among it."""
        return [tensor for weak in self._packed if (tensor := alive(weak)) is not None]

"""What a model holds, from one walk over its modules: for whatever asks for its parameters until the next walk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memtrace.attribution.models.quantised import is_packed, packed_tensors
from memtrace.sources.torch_private import alive, held_by, holdings, identities, own_parameters

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


class Held:
    """The parameters and buffers of some modules, each once, in the order in which the model lists them.

    Nothing of it is kept alive. Parameters and buffers are known by their place, a module and a name: torch swaps no
    tensor of which there is a weak reference (`torch.utils.swap_tensors`, and with it `module.to()` of a DTensor). A
    walk takes about 0.5 us a module and a tensor. Those of lazy modules are not among them before they have a shape,
    which the first forward pass gives them.

    Args:
        modules: a model's modules, each once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._modules = [weakref.ref(module) for module in modules]
        self._parameters: dict[int, Callable[[], nn.Parameter | None]] = {}
        self._buffers: dict[int, Callable[[], torch.Tensor | None]] = {}
        packed: dict[int, torch.Tensor] = {}
        self._has_lazy = False
        for module, holder in zip(modules, self._modules, strict=True):
            own_parameters, own_buffers = held_by(module)
            quantised = False
            for name, parameter in own_parameters.items():
                if parameter is not None:
                    self._parameters.setdefault(id(parameter), _place(holder, 0, own_parameters, name, parameter))
                    self._has_lazy = self._has_lazy or is_lazy(parameter)
                    quantised = quantised or (not parameter.requires_grad and is_packed(parameter))
            for name, buffer in own_buffers.items():
                if buffer is not None:
                    self._buffers.setdefault(id(buffer), _place(holder, 1, own_buffers, name, buffer))
                    self._has_lazy = self._has_lazy or is_lazy(buffer)
                    quantised = quantised or is_packed(buffer)
            if quantised:
                packed.update((id(tensor), tensor) for tensor in packed_tensors(module))
        self._packed = [weakref.ref(tensor) for tensor in packed.values()]
        self._identities, self._looked = self._identify(), self._look()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is still in its place, and nothing else. Takes about 0.1 us a module and a tensor."""
        return self._identities == self._identify()

    def reference_to(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """Returns what returns this tensor as long as it is held, or where it is not held here, as long as it lives."""
        return self._parameters.get(id(tensor)) or self._buffers.get(id(tensor)) or weakly(tensor)

    @property
    def is_as_walked(self) -> bool:
        """Whether the modules hold the same modules and the same storages as when they were walked over.

        It goes through all of them, which is most of what a counted step costs where it is asked.
        """
        return self._looked == self._look()

    def _identify(self) -> list[int]:
        return identities([weak() for weak in self._modules])

    def _look(self) -> list[int]:
        return holdings([weak() for weak in self._modules])

    def parameters(self, *, lazy: bool = False) -> list[nn.Parameter]:
        """Returns the parameters that are still there; with `lazy` also those that have no shape yet."""
        found = [parameter for find in self._parameters.values() if (parameter := find()) is not None]
        return found if lazy else self._shaped(found)

    def buffers(self) -> list[torch.Tensor]:
        """Returns the buffers that are still there."""
        return self._shaped([buffer for find in self._buffers.values() if (buffer := find()) is not None])

    def _shaped(self, tensors: list[_Tensor]) -> list[_Tensor]:
        return [tensor for tensor in tensors if not is_lazy(tensor)] if self._has_lazy else tensors

    def packed(self) -> list[torch.Tensor]:
        """Returns what quantised layers keep of their weights in other places than parameters, buffers among it."""
        return [tensor for weak in self._packed if (tensor := alive(weak)) is not None]


def weakly(tensor: _Tensor) -> Callable[[], _Tensor | None]:
    """Returns what returns a tensor as long as it lives."""
    return partial(alive, weakref.ref(tensor))


def have_gradients(parameters: Iterable[Callable[[], torch.Tensor | None]]) -> list[bool]:
    """Returns of each parameter whether it is there and has a gradient, as `Held.reference_to` gives them.

    What another tensor has that is held in the place of one stands for it. Takes about 0.1 us each: it is asked in each
    step, and most of what that would take are calls.
    """
    get: Callable[[Any, str], Any] = dict.get
    found: Any
    return [
        (
            (module := find.module()) is not None and (found := get(own_parameters(module), find.name)) is not None
            if type(find) is _Place
            else (found := find()) is not None
        )
        and found.grad is not None
        for find in parameters
    ]


@dataclass(slots=True, eq=False)
class _Place:
    """A module and a name. Called, it returns the tensor there, unless that is another one than at the last walk."""

    module: weakref.ref[nn.Module]
    which: int
    """0 of a parameter, 1 of a buffer."""
    name: str
    identity: int

    def __call__(self) -> Any:
        """Returns the tensor; None where it is gone."""
        holder = self.module()
        if holder is None:
            return None
        held: Any = held_by(holder)[self.which]
        found = dict.get(held, self.name)  # of `dict` itself: what ZeRO-3 has put there gathers what it is asked for
        return found if id(found) == self.identity else None


def _place(
    module: weakref.ref[nn.Module], which: int, held: Mapping[str, _Tensor | None], name: str, tensor: _Tensor
) -> Callable[[], Any]:
    """Returns what returns a tensor as long as its module holds it by this name.

    As long as it lives where the module holds tensors in no dictionary, as a scripted one does.
    """
    if isinstance(held, dict):
        return _Place(module, which, name, id(tensor))
    return weakly(tensor)

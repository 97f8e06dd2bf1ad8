"""Further models: those that a training holds beside the trained one, such as a reference model or a teacher."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memtrace.attribution.garbage import uncollected
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import Role
from memtrace.attribution.models.held import Held
from memtrace.attribution.models.quantised import scales_of
from memtrace.attribution.storages import storages_of
from memtrace.attribution.timeline import Lifetime
from memtrace.errors import ConfigError
from memtrace.guard import ask
from memtrace.record.categories import Category

OTHER_MODEL = "other_model"
"""Component of the weights of further models that nobody has named."""

_SEARCH_FROM = 0.01
"""Share of the live bytes, claimed by nobody, from which it is worth a search for the models that may hold them."""
_MAX_DEPTH = 4
"""How deep containers are looked into, in what is named."""
_SEARCH_AGAIN = 2
"""How many times as many bytes must be unclaimed as in the last search for the next one."""

RoleOf = Callable[[torch.Tensor], Role | None]
Find = Callable[[], Mapping[str, Any]]
"""Returns the further models that there are now, by name; called at each look. Must hold none of them."""


class FurtherModels:
    """The further models of one training: named ones, those that a framework holds, and those that were searched for.

    All they hold, buffers included, is weights of a component of their own: the name, or `other_model`. They are held
    weakly: one that the training drops is let go.

    Args:
        named: by name, a module or something that holds tensors: an object such as an EMA with shadow parameters, a
            tensor, or a list or dictionary of these.

    Raises:
        ConfigError: a name is no text or is taken by the trained model, or what it names holds no tensors.
    """

    def __init__(self, named: Mapping[str, Any] | None = None) -> None:
        self._find: Find | None = None
        self._named = [(name, weakly) for name, model in _checked(named) for weakly in _weakly(name, model)]
        self._found: list[weakref.ref[nn.Module]] = []
        self._unclaimed_bytes = 0
        """What nobody had claimed at the last search."""

    def also(self, find: Find | None) -> FurtherModels:
        """Returns the named models of this, with those that a framework holds."""
        further = FurtherModels()
        further._named, further._find = self._named, find
        return further

    def claim(self, ledger: Ledger, role_of: RoleOf, trained: Held) -> None:
        """Claims what the further models hold and the trained one does not.

        Run before the trained model is looked at: of a storage that both refer to, its role is kept.

        Args:
            ledger: where to claim.
            role_of: returns the role of a parameter that an engine has given another storage; None for plain weights.
            trained: what the trained model holds.
        """
        if not self._named and not self._found and self._find is None:
            return
        known = {id(tensor) for tensor in (*trained.parameters(), *trained.buffers())}
        for name, model in self._models():
            for tensor in _tensors_of(model):
                if id(tensor) in known:
                    continue
                role = role_of(tensor) or Role(Category.WEIGHTS, name)
                ledger.claim(tensor, role.category, role.component)
                ledger.claim_all(_kept_on(tensor), Category.WEIGHTS, name)

    def recognise(self, lifetimes: Sequence[Lifetime], ledger: Ledger, trained: nn.Module) -> None:
        """Tags the blocks of a window that nobody claims and that modules hold, and knows these modules from then on.

        The search goes through all objects of the process once. It is made where more than a
        hundredth of what outlives the window is unclaimed, and again where that has doubled since.

        Args:
            lifetimes: the blocks of a window, after all else was tagged.
            ledger: whose device the blocks are on.
            trained: the model that is trained.
        """
        lasting = [life for life in lifetimes if life.end is None]
        unclaimed = {life.address: life for life in lasting if life.tag is None}
        size = sum(life.nbytes for life in unclaimed.values())
        enough = size > _SEARCH_FROM * sum(life.nbytes for life in lasting)
        if not enough or size < _SEARCH_AGAIN * self._unclaimed_bytes:
            return
        self._search(ledger, trained, unclaimed)
        for entry in ledger.live():
            life = unclaimed.get(entry.address)
            if life is not None and life.nbytes == entry.nbytes:
                life.tag = entry.tag
        self._unclaimed_bytes = sum(life.nbytes for life in unclaimed.values() if life.tag is None)

    def _search(self, ledger: Ledger, trained: nn.Module, unclaimed: Mapping[int, object]) -> None:
        """Finds the modules that hold storages at these addresses, and claims what they hold."""
        known = {id(module) for module in trained.modules()}
        known.update(id(module) for reference in self._found if (module := reference()) is not None)
        with uncollected():
            modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
        for module in modules:
            held = () if id(module) in known else ask(_held_by_one, module) or ()
            if any(address in unclaimed for tensor in held for address in _addresses(tensor, ledger.device)):
                self._found.append(weakref.ref(module))
                ledger.claim_all(held, Category.WEIGHTS, OTHER_MODEL)

    def _models(self) -> Iterator[tuple[str, Any]]:
        """Yields each further model, those whose names say most last: the last name of a storage is kept."""
        self._found = [reference for reference in self._found if reference() is not None]
        yield from ((OTHER_MODEL, module) for reference in self._found if (module := reference()) is not None)
        yield from () if self._find is None else self._find().items()
        yield from ((name, model) for name, alive in self._named if (model := alive()) is not None)


def _tensors_of(model: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yields the tensors of a module, or of an object or container that refers to modules and tensors itself."""
    if isinstance(model, torch.Tensor):
        yield model
    elif isinstance(model, nn.Module):
        yield from _held_by(model.modules())
    elif depth < _MAX_DEPTH:
        if isinstance(model, (list, tuple, Mapping)):
            parts = model.values() if isinstance(model, Mapping) else model
        else:
            parts = () if depth else vars(model).values()
        for part in parts:
            yield from _tensors_of(part, depth + 1)


def _kept_on(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields what belongs to a parameter: scales of a quantised one, the shard of one that ZeRO-3 gathers."""
    if type(tensor) not in (nn.Parameter, torch.Tensor):
        yield from scales_of(tensor)
    shard = getattr(tensor, "ds_tensor", None)
    if isinstance(shard, torch.Tensor):
        yield shard


def _held_by(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Returns what modules hold, without the parameters of lazy ones that have no shape yet."""
    held = Held(modules)
    return [*held.parameters(), *held.packed(), *held.buffers()]


def _held_by_one(module: nn.Module) -> list[torch.Tensor]:
    """Returns what any module of the process holds; nothing where its `__init__` has not run."""
    return _held_by((module,)) if "_parameters" in vars(module) else []


def _addresses(tensor: torch.Tensor, device: torch.device) -> Iterable[int]:
    """Returns the addresses of a tensor's storages: none for a fake one, for which torch warns or raises."""
    return ask(_addresses_of, tensor, device) or ()


def _addresses_of(tensor: torch.Tensor, device: torch.device) -> Iterable[int]:
    return [storage.data_ptr() for storage, _, _ in storages_of(tensor, device)]


_TAKEN = frozenset({"trainable", "frozen"})


def _checked(named: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    if named is None:
        return ()
    if not isinstance(named, Mapping):
        raise ConfigError(f"further_models must be a dictionary of models by name, got {type(named).__name__}")
    for name in named:
        if not isinstance(name, str) or not name.strip() or name in _TAKEN:
            raise ConfigError(
                f"a name in further_models must be a text that is not blank, and neither 'trainable' nor 'frozen', "
                f"got {name!r}"
            )
    return named.items()


def _weakly(name: str, model: Any) -> Iterator[Callable[[], Any]]:
    """Yields a weak reference to what a name stands for, to each part of a list or dictionary."""
    if isinstance(model, (list, tuple, Mapping)):
        for part in model.values() if isinstance(model, Mapping) else model:
            yield from _weakly(name, part)
        return
    try:
        vars(model)
        yield weakref.ref(model)
    except TypeError:
        raise ConfigError(
            f"further_models[{name!r}] must be a torch.nn.Module or an object that holds tensors, "
            f"got {type(model).__name__}"
        ) from None

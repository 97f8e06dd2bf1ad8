"""The ledger: which live storage is known to be for what. Each storage counts once, whoever shares it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from memtrace.attribution.storages import storages_of
from memtrace.record.categories import Category
from memtrace.sources.events import MEMORY, Coordinates, Tag, TagEvent, tags_of
from memtrace.sources.torch_private import alive

PRECEDENCE = {
    category: rank
    for rank, category in enumerate(
        (
            Category.WEIGHTS,
            Category.MASTER_WEIGHTS,
            Category.OPTIMIZER_STATE,
            Category.COMM_BUFFERS,
            Category.GRADIENTS,
            Category.BUFFERS,
            Category.INPUTS,
            Category.TRANSIENT_WEIGHTS,
            Category.ACTIVATIONS,
            Category.WORKSPACES,
            Category.TEMPORARIES,
            Category.UNATTRIBUTED,
        )
    )
}
"""Who wins where a storage has several roles: a weight saved for backward is a weight, a flat buffer that weights are
views of is weights, a bucket that gradients are views of for a while is a bucket, a batch saved for backward is the
batch."""


_LASTING = frozenset({Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE})
"""Roles that end only where somebody puts another storage in the place of one."""


class _Entry(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, with what is known of it; its maker sets the fields, which is quicker."""

    __slots__ = ("address", "identity", "nbytes", "tag")

    address: int
    identity: int
    nbytes: int
    tag: Tag


class Ledger:
    """Weak map from storage to tag, for one device.

    A claim costs about 1 us a storage. The ledger keeps no tensor alive: a storage that dies leaves by itself.
    While a journal is kept, every claim and every death is noted with its time, so that the replay of events can
    give the block at that address its tag for as long as it lives.

    Args:
        device: the device whose storages are kept.
        coordinates: how the events that the journal is joined with name an instant and a storage.
    """

    def __init__(self, device: torch.device, coordinates: Coordinates = MEMORY) -> None:
        self._device = device
        self._coordinates = coordinates
        self._now_ns, self._address_of = coordinates.now_ns, coordinates.address_of
        self._entries: dict[int, _Entry] = {}
        self._journal: list[TagEvent] | None = None
        self._totals: dict[Tag, int] | None = None
        """What was added up last; None where something has changed since."""
        self.has_lost = False
        """Whether a weight, a master weight or optimizer state has died since this was last set to False."""
        ledger = weakref.ref(self)

        def forget(entry: _Entry) -> None:
            of = ledger()
            if of is not None:
                of._forget(entry)

        self._on_death: Callable[[Any], None] = forget

    @property
    def device(self) -> torch.device:
        """The device whose storages are kept; others are skipped."""
        return self._device

    @property
    def coordinates(self) -> Coordinates:
        """How instants and storages are named in the journal."""
        return self._coordinates

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, tensor: torch.Tensor, category: Category, component: str = "") -> None:
        """Notes that the storage of this tensor is for `category`.

        A stronger role that the storage already has is kept; an equal one is replaced. The element type in the tag is
        the tensor's own.
        """
        self.claim_all((tensor,), category, component)

    def claim_all(self, tensors: Iterable[torch.Tensor], category: Category, component: str = "") -> None:
        """Notes the same of many tensors, which is quicker than one by one."""
        entries, device, journal = self._entries, self._device, self._journal
        self._totals = None
        address_of, tags = self._address_of, tags_of(category, component)
        now_ns = 0 if journal is None else self._now_ns()
        for tensor in tensors:
            for storage, nbytes, dtype in storages_of(tensor, device):
                tag = tags[dtype]
                entry = entries.get(id(storage))
                if entry is None:
                    entry = _Entry(storage, self._on_death)
                    entry.identity, entry.address = id(storage), address_of(storage)
                    entry.nbytes, entry.tag = nbytes, tag
                    entries[entry.identity] = entry  # whole, also where Ctrl-C comes in between
                elif entry.tag is not tag and PRECEDENCE[entry.tag.category] >= PRECEDENCE[category]:
                    entry.tag = tag
                if journal is not None:
                    journal.append(TagEvent(now_ns, address_of(storage), nbytes, entry.tag))

    def note(self, tensor: torch.Tensor) -> None:
        """Notes in the journal where the storage of this tensor is now, if the ledger knows it.

        For storages that are resized while they live: each time they get another address.
        """
        journal = self._journal
        if journal is None:
            return
        for storage, nbytes, _ in storages_of(tensor, self._device):
            entry = self._entries.get(id(storage))
            if entry is not None:
                journal.append(TagEvent(self._now_ns(), self._address_of(storage), nbytes, entry.tag))

    def role_of(self, tensor: torch.Tensor) -> Category | None:
        """Returns what the first storage of a tensor is known to be for."""
        for storage, _, _ in storages_of(tensor, self._device):
            entry = self._entries.get(id(storage))
            return None if entry is None else entry.tag.category
        return None

    def clear(self, keep: Category | None = None) -> None:
        """Forgets every entry that is not of the category `keep`; their deaths are not noted any more."""
        entries = list(self._entries.items())  # other threads, and storages that die, change it
        self._entries = {key: entry for key, entry in entries if entry.tag.category is keep}
        self._totals = None

    def live(self) -> list[TagEvent]:
        """Returns address, size and tag of every storage as it is now; storages resized to nothing are left out."""
        now = self._now_ns()
        self._totals = None
        found = []
        for entry in list(self._entries.values()):
            storage = alive(entry)
            if storage is None:
                continue
            entry.address, entry.nbytes = self._address_of(storage), storage.nbytes()
            if entry.nbytes:
                found.append(TagEvent(now, entry.address, entry.nbytes, entry.tag))
        return found

    def totals(self) -> Mapping[Tag, int]:
        """Returns the bytes of each tag as they were claimed; about 0.1 us a storage where something has changed."""
        if self._totals is None:
            totals: dict[Tag, int] = {}
            for entry in list(self._entries.values()):
                totals[entry.tag] = totals.get(entry.tag, 0) + entry.nbytes
            self._totals = totals
        return self._totals

    @property
    def keeps_journal(self) -> bool:
        """Whether claims and deaths are being noted."""
        return self._journal is not None

    @property
    def journal_length(self) -> int:
        """How much has been noted since the journal was begun."""
        return 0 if self._journal is None else len(self._journal)

    def begin_journal(self) -> None:
        """Starts noting claims and deaths."""
        self._journal = []

    def end_journal(self) -> list[TagEvent]:
        """Stops noting and returns what was noted since, in the order in which it happened."""
        journal, self._journal = self._journal or [], None
        return journal

    def _forget(self, entry: _Entry) -> None:
        identity = getattr(entry, "identity", None)  # none where Ctrl-C has come before it had one
        if identity is not None and self._entries.get(identity) is entry:
            self._entries.pop(identity, None)
            self._totals = None
            if entry.tag.category in _LASTING:
                self.has_lost = True
            journal = self._journal
            if journal is not None:
                journal.append(TagEvent(self._now_ns(), entry.address, entry.nbytes, None))

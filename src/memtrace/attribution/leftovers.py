"""What traced steps leave behind and nobody claims, on a CPU, whose allocator cannot list it."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from memtrace.attribution.storages import storages_of
from memtrace.attribution.timeline import Lifetime, StepMarks, Timeline
from memtrace.sources.events import MEMORY, Coordinates

MOST_BLOCKS = 4096
"""Blocks that are followed at most; the oldest of more are taken to stay for ever."""
_MOST_OUTPUTS = 64
"""Storages of outputs that are noted of one step; the last ones."""


@dataclass(slots=True)
class _Block:
    nbytes: int
    storage: weakref.ref[torch.UntypedStorage] | None
    """Of an output of the model; None where nobody knows whose block it is."""

    @property
    def is_gone(self) -> bool:
        return self.storage is not None and self.storage() is None


class Leftovers:
    """Tells which blocks of those that earlier steps have left behind are gone.

    A loop that names what its model returns keeps it until the next step has another one: each step leaves such a block
    behind, and together they take no more than one. A block is gone where a later trace has its free or puts another
    one at its place; of the model's outputs also where the storage has died, which needs no trace.

    Args:
        device: the device that is watched. On any other than a CPU nothing is followed: there traces list all blocks.
        coordinates: how the events name a storage.
    """

    def __init__(self, device: torch.device, coordinates: Coordinates = MEMORY) -> None:
        self._device, self._address_of = device, coordinates.address_of
        self._follows = device.type == "cpu"
        self._blocks: dict[int, _Block] = {}
        """By address, the oldest first."""
        self._outputs: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Storages of what the model has returned in the window at work, by address."""
        self._gone = 0

    def begin(self) -> None:
        """Notes that a window begins."""
        self._outputs.clear()

    def note(self, output: Iterable[torch.Tensor]) -> None:
        """Notes tensors that the model has returned in the window at work; nothing is kept alive."""
        if not self._follows:
            return
        for tensor in islice(output, _MOST_OUTPUTS):
            for storage, _, _ in storages_of(tensor, self._device):
                try:
                    address = self._address_of(storage)
                except RuntimeError:  # it has no memory
                    continue
                self._outputs.pop(address, None)
                self._outputs[address] = weakref.ref(storage)
        while len(self._outputs) > _MOST_OUTPUTS:
            del self._outputs[next(iter(self._outputs))]

    def follow(self, timeline: Timeline, marks: StepMarks) -> None:
        """Takes in a traced step: what it has let go of earlier steps', and what it leaves behind itself."""
        if not self._follows:
            return
        if self._blocks:
            self._let_go(self._replaced(timeline))
        for life in timeline.left_behind(marks):
            self._blocks.pop(life.address, None)
            self._blocks[life.address] = _Block(life.nbytes, self._outputs.get(life.address))
        while len(self._blocks) > MOST_BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def gone(self) -> int:
        """Returns the bytes that are gone since this was last asked."""
        self._let_go([address for address, block in self._blocks.items() if block.is_gone])
        gone, self._gone = self._gone, 0
        return gone

    def _let_go(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            self._gone += self._blocks.pop(address).nbytes

    def _replaced(self, timeline: Timeline) -> list[int]:
        """Returns the addresses of blocks that were freed in the window, or that others lie upon."""
        later: dict[int, Lifetime | None] = {life.address: life for life in timeline.lifetimes}
        later.update(dict.fromkeys(timeline.unknown_frees))
        ordered = sorted(later)
        return [address for address, block in self._blocks.items() if _covers(ordered, later, address, block.nbytes)]


def _covers(ordered: list[int], later: dict[int, Lifetime | None], address: int, nbytes: int) -> bool:
    """Whether a block lies upon these bytes, or was freed there."""
    after = bisect_right(ordered, address + nbytes - 1)
    if not after:
        return False
    nearest = ordered[after - 1]
    life = later[nearest]
    return nearest >= address or (life is not None and nearest + life.nbytes > address)

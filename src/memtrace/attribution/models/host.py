"""What a run keeps in the host's memory while a device is watched: where offloaded bytes are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.record.breakdown import EntryKey, ordered_entries


class HostMemory:
    """The persistent tensors of a model, its optimizers and its engines that are on the CPU.

    They are told as those on the device are, by the same look at them. What does not live longer than a step, such as
    activations that are offloaded for the backward pass, is not among them.

    Args:
        scan: what to look at.
        device: the device that is watched; where it is the CPU itself, nothing is kept apart.
    """

    def __init__(self, scan: Scan, device: torch.device) -> None:
        self._scan = scan
        self._apart = device.type != "cpu"
        self.entries: Mapping[EntryKey, int] = {}
        """Bytes at the last look."""

    def look(self) -> None:
        """Looks at all persistent storages; costs about 1 us for each that is on the host."""
        if not self._apart:
            return
        ledger = Ledger(torch.device("cpu"))
        self._scan.claim_persistent(ledger, anew=False)
        self.entries = ordered_entries({EntryKey(*tag): size for tag, size in ledger.totals().items()})

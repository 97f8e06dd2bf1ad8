"""Which source tells what the allocator of a device does."""

from __future__ import annotations

import logging

import torch

from memtrace.breakdown import AllocatorReading
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.cuda import CudaEvents
from memtrace.sources.events import EventSource, Window

logger = logging.getLogger("memtrace")


def event_source(device: torch.device) -> EventSource:
    """Returns the source of allocator events of a device; one without events for a kind that memtrace cannot read."""
    if device.type == "cuda":
        return CudaEvents(device.index)
    return CpuEvents() if device.type == "cpu" else NoEvents(device)


class NoEvents:
    """The source of a device whose allocator nobody can be asked about: the events of the CPU are not its own."""

    is_open = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._said = False

    def open(self, expected_allocations: int | None = None) -> bool:
        """Returns False, and says once why."""
        if not self._said:
            self._said = True
            logger.warning(
                "memtrace: no step is traced on %s: there are events of cuda and cpu only. What is shown is what the "
                "model, its optimizers and its batches hold",
                self._device,
            )
        return False

    def fits(self, allocations: int) -> bool:
        """Returns True: nothing is recorded."""
        return True

    def interrupted(self) -> bool:
        """Returns False: nothing is recorded."""
        return False

    def close(self) -> Window:
        """Never called: no window opens."""
        raise AssertionError("close() without open()")

    def abandon(self) -> None:
        """Does nothing."""

    def reading(self) -> AllocatorReading | None:
        """Returns None: the counters are not known."""
        return None

"""Which source tells what the allocator of a device does."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources import torch_private
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.cuda.source import CudaEvents
from memtrace.sources.events import Annotator, EventSource, Window

logger = logging.getLogger("memtrace")

_ALLOCATED, _RESERVED = "allocated_bytes.all.current", "reserved_bytes.all.current"


def event_source(device: torch.device) -> EventSource:
    """Returns the source of allocator events of a device; one without events for a kind that memtrace cannot read."""
    if device.type == "cuda":
        return CudaEvents(device.index)
    return CpuEvents() if device.type == "cpu" else NoEvents(device)


def annotator_of(source: EventSource) -> Annotator | None:
    """Returns what writes into the user's own history; None for a device of which nobody can record one."""
    return source if isinstance(source, CudaEvents) else None


class NoEvents:
    """The source of a device whose allocator keeps no history: the events of the CPU are not its own.

    Its counters are read where torch has them for every kind of accelerator (`torch.accelerator`, from 2.9 on).
    """

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
                "model, its optimizers and its batches hold%s",
                self._device,
                "" if self.reading() is None else ", and the allocator's counters",
            )
        return False

    def fits(self, allocations: int) -> bool:
        """Returns True: nothing is recorded."""
        return True

    def interrupted(self) -> bool:
        """Returns False: nothing is recorded."""
        return False

    def hears_this_thread(self) -> bool:
        """Returns True: no thread is left out."""
        return True

    def close(self) -> Window:
        """Never called: no window opens."""
        raise AssertionError("close() without open()")

    def abandon(self) -> None:
        """Does nothing."""

    def reading(self) -> AllocatorReading | None:
        """Returns the counters; None where torch has none for this kind of device, or before its first allocation."""
        kind = torch_private.current_accelerator()
        ask = None if kind is None else getattr(torch.accelerator, "memory_stats", None)
        if ask is None or kind is None or kind.type != self._device.type:
            return None
        try:
            stats = ask(self._device.index or 0)
        except RuntimeError:  # its allocator keeps none
            return None
        return None if _ALLOCATED not in stats or _RESERVED not in stats else _reading(stats)


def _reading(stats: Mapping[str, int]) -> AllocatorReading:
    return AllocatorReading(
        allocated_bytes=stats[_ALLOCATED],
        reserved_bytes=stats[_RESERVED],
        requested_bytes=stats.get("requested_bytes.all.current") or None,
        peak_allocated_bytes=stats.get("allocated_bytes.all.peak"),
        peak_requested_bytes=stats.get("requested_bytes.all.peak") or None,
        retries=stats.get("num_alloc_retries"),
        ooms=stats.get("num_ooms"),
        allocations=stats.get("allocation.all.allocated"),
        device_allocations=stats.get("num_device_alloc"),
    )

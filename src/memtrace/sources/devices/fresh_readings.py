"""What is read of a device on the asking thread, beside what the sampling thread reads: it takes microseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from memtrace.record.breakdown import DeviceReading
from memtrace.sources.devices.host import refreshed

Refresh = Callable[[DeviceReading], DeviceReading]


def refresh_of(device: torch.device) -> Refresh | None:
    """Returns what brings a reading of this device up to date; None where nothing does.

    Of a CPU that is what the process holds. Of a CUDA device it is total and free memory where the driver's library
    does not tell them, as with memory that the device shares with the host (GB10, Jetson), or where there is none to
    ask, as in some containers.
    """
    if device.type == "cpu":
        return refreshed
    return partial(with_memory_by_torch, device.index) if device.type == "cuda" else None


def with_memory_by_torch(index: int, reading: DeviceReading) -> DeviceReading:
    """Returns a reading with the memory that CUDA's runtime tells, unless it has that already.

    Takes about 0.2 ms then. What the allocator could still hand out is told where it has got nothing from the device
    and given nothing back while the runtime was asked, and by an allocator that counts.
    """
    if reading.total_bytes is not None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return reading
    reserved = _reserved(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # the device is lost, or the runtime refuses
        return reading
    free_and_reserved = None if reserved is None or _reserved(index) != reserved else free + reserved
    return replace(
        reading,
        total_bytes=total,
        free_bytes=free,
        used_bytes=total - free,
        free_and_reserved_bytes=free_and_reserved,
    )


def _reserved(index: int) -> int | None:
    """Returns what the allocator has got from the device; None of one without counters (a pluggable one)."""
    try:
        return torch.cuda.memory_reserved(index)
    except RuntimeError:
        return None

"""Which source tells what the allocator of a device does."""

from __future__ import annotations

import torch

from memtrace.sources.cpu import CpuEvents
from memtrace.sources.cuda import CudaEvents
from memtrace.sources.events import EventSource


def event_source(device: torch.device) -> EventSource:
    """Returns the source of allocator events of a device; a CPU's for every device that is not CUDA."""
    return CudaEvents(device.index) if device.type == "cuda" else CpuEvents()

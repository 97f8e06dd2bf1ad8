"""Gives a run less memory than the machine has: what happens when memory runs out can be tried where plenty is left."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from memtrace.record.units import parse_bytes

_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h: blocks from this size on are got from the system one by one, and given back when freed."""


def allow_only(size: str) -> None:
    """Lets this process take that much more memory than it has now, such as `1GiB`.

    On a GPU torch's allocator refuses what is beyond it; on a CPU the operating system does (Linux only).

    Raises:
        ConfigError: the size is none.
    """
    allowed = parse_bytes(size)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + allowed) / total))
        return
    import resource  # noqa: PLC0415 - Windows has none

    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # else what is freed would still count
    torch.ones(1 << 20, requires_grad=True).sum().backward()  # torch's threads have their stacks from now on
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    data = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, resource.RLIM_INFINITY))

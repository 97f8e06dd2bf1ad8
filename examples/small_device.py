"""Gives a run less memory than the machine has: what happens when memory runs out can be tried where plenty is left."""

from __future__ import annotations

from pathlib import Path

import torch

from memtrace.units import parse_bytes


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

    torch.ones(1 << 20, requires_grad=True).sum().backward()  # torch's threads have their stacks from now on
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    data = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, resource.RLIM_INFINITY))

"""Which process this is, told apart from one that has its number later, and how many may run at once."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_LOADED = time.time()
_TOLERANCE_SECONDS = 2.0
"""The kernel tells the time of boot in whole seconds, and corrects it as the clock is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process of some machine."""

    host: str
    pid: int
    start_unix_seconds: float
    """When it began, seconds since 1970, to about a second; when memtrace was loaded where the system does not tell."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """Returns a process of this machine."""
        return cls(host=socket.gethostname(), pid=pid, start_unix_seconds=_start(pid) or _LOADED)

    def is_alive(self) -> bool | None:
        """Returns whether it runs; None where nobody here can tell: on another machine, or on another system."""
        if self.host != socket.gethostname() or _start(os.getpid()) is None:
            return None
        start = _start(self.pid)
        return start is not None and abs(start - self.start_unix_seconds) <= _TOLERANCE_SECONDS


def usable_processors() -> int:
    """Returns on how many processors this process may run; those of the machine where the system does not tell."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def _start(pid: int) -> float | None:
    """Returns when a process began; None where there is none, one that has ended (a zombie), or no such system."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = next(line for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime "))
        if fields[0] in ("Z", "X"):
            return None
        return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None

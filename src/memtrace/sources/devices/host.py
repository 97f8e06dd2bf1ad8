"""The CPU as the device: the memory of the machine, or of the cgroup that limits this process.

Read from the kernel's files (Linux). Where they are not there, the fields are None.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from memtrace.record.breakdown import DeviceReading

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MOST_BYTES = 1 << 16


class CpuDevice:
    """The memory this process can have on this machine.

    `total_bytes` is the machine's, or the lowest limit of a cgroup above the process; `free_bytes` what can still be
    had without swapping, `used_bytes` the rest of the total. `process_bytes` is the resident set, which counts shared
    pages in full: what other processes hold does not follow from it and stays None.

    Args:
        proc: where the process file system is mounted.
        cgroups: where the control group file systems are mounted, version 1, 2 or both.
    """

    def __init__(self, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc = proc
        self._cgroups = cgroups

    def read(self) -> DeviceReading:
        """Returns what the kernel says now; takes under a millisecond."""
        machine = parse_meminfo(_text(self._proc / "meminfo"))
        resident = parse_statm(_text(self._proc / "self/statm"), _PAGE_BYTES)
        if machine is None:
            return DeviceReading(name="cpu", process_bytes=resident)
        membership = _text(self._proc / "self/cgroup")
        room = tightest([machine, *cgroup_rooms(membership, self._cgroups)])
        return DeviceReading(
            name="cpu",
            total_bytes=room.total_bytes,
            used_bytes=None if room.free_bytes is None else room.total_bytes - room.free_bytes,
            free_bytes=room.free_bytes,
            process_bytes=resident,
        )

    def close(self) -> None:
        """Does nothing: no file is held open."""


def refreshed(reading: DeviceReading) -> DeviceReading:
    """Returns a reading of the CPU with the resident set of now."""
    resident = parse_statm(_text("/proc/self/statm"), _PAGE_BYTES)
    return replace(reading, process_bytes=reading.process_bytes if resident is None else resident)


class Room(NamedTuple):
    """Memory that the machine has or a cgroup allows, and what of it can still be had (None where not known)."""

    total_bytes: int
    free_bytes: int | None


class _ControllerFiles(NamedTuple):
    """Names of the memory controller's files in one version of cgroups."""

    limit: str
    usage: str
    reclaimable: str
    """Key in memory.stat of the page cache that the kernel drops first."""


_VERSION_1 = _ControllerFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _ControllerFiles("memory.max", "memory.current", "inactive_file")


def parse_meminfo(text: str) -> Room | None:
    """Returns the machine's room from /proc/meminfo: MemTotal and MemAvailable, which counts page cache as free."""
    total = _number(r"^MemTotal:\s+(\d+) kB$", text)
    available = _number(r"^MemAvailable:\s+(\d+) kB$", text)
    if total is None:
        return None
    return Room(total * 1024, None if available is None else available * 1024)


def parse_statm(text: str, page_bytes: int) -> int | None:
    """Returns the resident set in bytes from /proc/self/statm, whose second number counts pages."""
    pages = text.split(maxsplit=2)[1:2]
    return int(pages[0]) * page_bytes if pages else None


def cgroup_rooms(membership: str, mount: Path) -> Iterator[Room]:
    """Yields the room that each limited cgroup leaves, from the one of the process up to the root.

    As the kubelet does, page cache that has not been used lately counts as free: the kernel drops it before it kills
    (https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/).

    Args:
        membership: the text of /proc/self/cgroup. A path that is not visible under `mount`, as in a container that
            sees its own group as the root, stands for the root of the mount.
        mount: directory of the version 2 hierarchy, or of one directory for each controller of version 1.
    """
    for line in membership.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            root, files = mount, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _VERSION_1
        else:
            continue
        leaf = root / path.lstrip("/")
        for directory in (leaf, *leaf.parents):
            limit = _number(r"^(\d+)$", _text(directory / files.limit))
            if limit is not None:
                yield Room(limit, _free(directory, limit, files))
            if directory == root:
                break


def tightest(rooms: list[Room]) -> Room:
    """Returns the lowest total, and the lowest free of all rooms that are nested in one another.

    Rooms above the first one's total are limits that do not limit (version 1 writes about 2**63 for none). Free is
    None where a room that does limit does not tell.
    """
    binding = [room for room in rooms if room.total_bytes <= rooms[0].total_bytes]
    total = min(room.total_bytes for room in binding)
    known = [room.free_bytes for room in binding if room.free_bytes is not None]
    return Room(total, min(total, *known) if len(known) == len(binding) else None)


def _free(directory: Path, limit: int, files: _ControllerFiles) -> int | None:
    usage = _number(r"^(\d+)$", _text(directory / files.usage))
    if usage is None:
        return None
    reclaimable = _number(rf"^{files.reclaimable} (\d+)$", _text(directory / "memory.stat")) or 0
    return max(0, limit - max(0, usage - reclaimable))


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text, re.MULTILINE)
    return None if match is None else int(match[1])


def _text(path: str | Path) -> str:
    """Returns the text of a file of the kernel, which comes in one piece; empty where it cannot be read.

    Asked in each step with a record, and so without what a text file takes.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(file, _MOST_BYTES).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(file)

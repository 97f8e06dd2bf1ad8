"""Time and memory that `memtrace read` takes for a large snapshot.

usage: python -m benchmarks.read_snapshot [MB [FRAMES]]

Writes a snapshot of so many MB (1,000 by default), whose entries have stacks of so many frames (30 by default, 0 for
none), into a temporary directory and reads it with the whole command in a process of its own. Prints the size of the
file, the processor time, the largest resident set and what the command said meanwhile; the exit status is 1 where the
command fails or takes more than 2 GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pickled_history import write_snapshot

BOUND_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What reading a snapshot took."""

    status: int
    file_bytes: int
    seconds: float
    """Of the processor."""
    resident_bytes: int
    """The largest resident set of the command."""
    said: str
    """What the command printed, progress included."""


def read(path: Path) -> Reading:
    """Reads a snapshot with the whole command, as a user does."""
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "memtrace", "read", str(path)]
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode()
    return Reading(
        status=process.returncode,
        file_bytes=path.stat().st_size,
        seconds=used.ru_utime + used.ru_stime,
        resident_bytes=used.ru_maxrss << 10,
        said=text,
    )


def _arguments(words: list[str]) -> Iterator[int]:
    yield int(words[0]) * 1_000_000 if words else 1_000_000_000
    yield int(words[1]) if len(words) > 1 else 30


def main() -> int:
    nbytes, frames = _arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot.pickle"
        entries = write_snapshot(path, nbytes, frames)
        found = read(path)
    print(found.said)
    print(
        f"{entries:,} entries, {found.file_bytes / 1e6:,.0f} MB: {found.seconds:.0f} s of processor, "
        f"{found.resident_bytes / 1e6:,.0f} MB of memory"
    )
    return int(found.status != 0 or found.resident_bytes > BOUND_BYTES)


if __name__ == "__main__":
    sys.exit(main())

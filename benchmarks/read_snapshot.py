"""Time and memory that `memtrace read` takes for a large snapshot.

usage: python -m benchmarks.read_snapshot [ENTRIES [FRAMES]]

Writes a snapshot whose entries have stacks of so many frames (30 by default, 0 for none) into a temporary directory and
reads it in a process of its own. Prints the size of the file, the processor time and the largest resident set; the exit
status is 1 where that is above 2 GB.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

BOUND_BYTES = 2_000_000_000
STACKS = 200
LIVE = 50
"""Blocks in use, beyond which the oldest one is freed."""


def write_snapshot(path: Path, entries: int, frames: int) -> None:
    """Writes a history of allocations and frees; entries share no dictionaries, as torch's do."""
    chance, live, trace, address = random.Random(0), deque[tuple[int, int]](), [], 1 << 40
    known = [
        {"filename": f"/site-packages/models/modeling_{line % 7}.py", "line": line, "name": f"forward_{line % 40}"}
        for line in range(STACKS + frames)
    ]
    for number in range(entries):
        stack = [dict(frame) for frame in known[number % STACKS :][:frames]]
        if len(live) > LIVE:
            action, (at, size) = "free_completed", live.popleft()
        else:
            action, at, size = "alloc", address, 512 * chance.randint(1, 4000)
            address += size
            live.append((at, size))
        entry = {"action": action, "addr": at, "size": size, "stream": 0, "time_us": 7 * number, "frames": stack}
        trace.append(entry)
    snapshot: dict[str, Any] = {"segments": [], "device_traces": [trace]}
    with path.open("wb") as file:
        pickle.dump(snapshot, file, protocol=4)


def main() -> int:
    entries, frames = (int(word) for word in (sys.argv[1:] + ["400000", "30"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot.pickle"
        writer = multiprocessing.Process(target=write_snapshot, args=(path, entries, frames))
        writer.start()
        writer.join()
        reader = subprocess.Popen([sys.executable, "-m", "memtrace", "read", str(path)], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(reader.pid, 0)
        nbytes = path.stat().st_size
    seconds, most = used.ru_utime + used.ru_stime, used.ru_maxrss << 10
    print(f"{entries:,} entries, {nbytes / 1e6:,.0f} MB: {seconds:.0f} s of processor, {most / 1e6:,.0f} MB of memory")
    return int(status != 0 or most > BOUND_BYTES)


if __name__ == "__main__":
    sys.exit(main())

"""How much longer a script takes to start under `memtrace run`, in processor time.

usage: python -m benchmarks.start

An empty script is started in turns, by Python and by `memtrace run` without and with settings. Prints the least
processor time of each and the difference beside its bound; the exit status is 1 where one is above it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

BOUND_SECONDS = 0.05
TURNS = 30
RUN = ["-m", "memtrace", "run"]
WAYS = {"python": [], "memtrace run": RUN, "with settings": [*RUN, "--port", "0", "--trace-every", "50"]}


def seconds(words: list[str]) -> float:
    """Returns the processor time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "empty.py"
        script.write_text("")
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(TURNS):
            for way, words in WAYS.items():
                taken[way].append(seconds([*words, str(script)]))
    bare = min(taken["python"])
    for way, each in taken.items():
        print(f"{way:15} {min(each) * 1e3:6.1f} ms, {(min(each) - bare) * 1e3:+6.1f} ms of {BOUND_SECONDS * 1e3:.0f}")
    return int(max(min(each) for each in taken.values()) - bare > BOUND_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

"""How long a recording of an allocator takes under other settings: a million events under eight of them.

    python -m benchmarks.allocator [--results DIRECTORY]

The history is made here: steps of a model of 24 layers, each with texts of another length, under a limit that is not
reached. It is replayed by `what_if` as `memtrace allocator --what-if` does it, in two processes, their start included.
The figures are seconds that passed and the processor's time of all processes. Fails where the limit is not kept.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from os import times
from pathlib import Path

import torch

from benchmarks.results import environment, write
from memtrace.allocator.recording import AllocatorRecording
from memtrace.allocator.settings import AllocatorSettings
from memtrace.allocator.what_if import candidates, what_if
from memtrace.record.units import GIB, MIB

EVENTS = 1_000_000
LIMIT_SECONDS = 30.0
"""For eight settings on two cores."""
SETTINGS = 8
_SEED = 20
_LAYERS = 24
_WIDTHS = (2, 3, 8)
"""Tensors that a layer keeps until its backward pass, by bytes for each token over 4096."""


def history(events: int) -> AllocatorRecording:
    """Returns a history of `events` allocations and frees: weights, then steps with texts of other lengths in each."""
    lengths = random.Random(_SEED)
    made = [48 * MIB] * 160
    blocks = len(made)
    while len(made) < events:
        length, saved = lengths.randrange(256, 1024), []
        for _ in range(_LAYERS):
            for width in _WIDTHS:
                made.append(length * width * 4096)
                saved.append(blocks)
                blocks += 1
            made += [length * 8 * 4096, -blocks - 1]
            blocks += 1
        made += [-number - 1 for number in reversed(saved)]
    return AllocatorRecording(sizes_at_begin=(), events=made[:events], from_the_start=True, limit_bytes=80 * GIB)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the result and returns 0, or 1 where the limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="directory for the result; default benchmarks/results")
    parser.add_argument("--events", type=int, default=EVENTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    recording = history(options.events)
    plain = AllocatorSettings()
    others = [setting for setting in candidates(plain, collects=True) if setting != plain][: SETTINGS - 1]
    busy, begin = sum(times()[:4]), time.perf_counter()
    found = what_if(recording, others=others)
    seconds, processor = time.perf_counter() - begin, sum(times()[:4]) - busy
    assert len(found.ranked) == SETTINGS and all(outcome.fits for outcome in found.ranked)
    result = {
        "events": options.events,
        "settings": [outcome.settings.text or "defaults" for outcome in found.ranked],
        "seconds": seconds,
        "processor_seconds": processor,
        "bound": LIMIT_SECONDS,
    }
    print(f"{options.events:,} events under {SETTINGS} settings: {seconds:.1f} s, {processor:.1f} s of processor time")
    print(write("allocator", result, environment(torch.device("cpu")), options.results))
    return int(seconds > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

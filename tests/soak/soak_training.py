"""A long run of a small model with memtrace on, in a process of its own: prints what the process held as it went.

usage: python soak_training.py LOG_DIR STEPS
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import torch
from small_training import make, step

from memtrace import MemoryTracer, TracerConfig

TRACE_EVERY = 20
LOG_MAX_BYTES = 1 << 20
SAMPLE_EVERY = 100
SCRAPE_EVERY = 500


def held(log_dir: Path, number: int) -> dict[str, int]:
    """Returns what the process holds now, and what its step logs take on the disk."""
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    logs = [path.stat().st_size for path in log_dir.glob("steps-*")]
    return {
        "step": number,
        "rss_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "log_files": len(logs),
        "log_bytes": sum(logs),
        "largest_log_bytes": max(logs, default=0),
    }


def main() -> None:
    log_dir, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    model, optimizer = make()
    config = TracerConfig(
        strict=True, port=0, log_dir=log_dir, trace_every=TRACE_EVERY, log_max_bytes=LOG_MAX_BYTES, oom_reports=0
    )
    ask = build_opener(ProxyHandler({})).open
    samples = []
    with MemoryTracer(model, optimizer, config) as tracer:
        assert tracer.url is not None
        for number in range(1, steps + 1):
            step(model, optimizer)
            if number % SCRAPE_EVERY == SAMPLE_EVERY // 2:  # its connection and thread are gone by the next sample
                with ask(tracer.url) as page:
                    page.read()
            if number % SAMPLE_EVERY == 0:
                samples.append(held(log_dir, number))
        totals = tracer.snapshot().totals
        up = tracer.snapshot().up
    print(json.dumps({"samples": samples, "steps": totals.steps, "traced_steps": totals.traced_steps, "up": up}))


if __name__ == "__main__":
    main()

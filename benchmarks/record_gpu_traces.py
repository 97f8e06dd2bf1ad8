"""Records what CUDA's caching allocator does in a few small training steps, as fixtures for tests without a GPU.

usage: python -m benchmarks.record_gpu_traces

Writes one file a workload to tests/fixtures/gpu/traces/. Each workload runs in a process of its own, so that its
trace begins with an empty allocator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import Training, bf16_llama, tiny
from memtrace.sources import recording_torch_private
from memtrace.sources.cuda.source import MAX_EVENTS

SCHEMA = "memtrace.allocator-trace/1"
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "gpu" / "traces"
STEPS = 2
_ENTRY = ("action", "addr", "size", "time_us")
_SEGMENT = ("device", "address", "total_size", "segment_type")
_BLOCK = ("address", "size", "requested_size", "state")


def small_llama(device: torch.device) -> Training:
    """Two layers of Llama in bfloat16, with tensors for both pools of the allocator."""
    return bf16_llama(device, layers=2, width=512, vocabulary=8192, tokens=(2, 256))


RECORDED: Mapping[str, Callable[[torch.device], Training]] = {"tiny": tiny, "llama": small_llama}


def document(snapshot: Mapping[str, Any], stats: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns what a fixture keeps of a snapshot with history of device 0, and of the counters at its end."""
    return {
        "schema": SCHEMA,
        "origin": origin,
        "counters": {name: stats[f"{name}.all.current"] for name in ("requested_bytes", "allocated_bytes")}
        | {"peak_reserved_bytes": stats["reserved_bytes.all.peak"]},
        "snapshot": {
            "device_traces": [[_kept(entry, _ENTRY) for entry in snapshot["device_traces"][0]]],
            "segments": [
                _kept(segment, _SEGMENT) | {"blocks": [_kept(block, _BLOCK) for block in segment["blocks"]]}
                for segment in snapshot["segments"]
                if segment.get("device", 0) == 0
            ],
        },
    }


def record(name: str) -> dict[str, Any]:
    """Returns the trace of some steps of a workload, from the first allocation of this process on."""
    device = torch.device("cuda", 0)
    recording_torch_private.record_memory_history(MAX_EVENTS)
    training = RECORDED[name](device)
    for _ in range(STEPS):
        training.step()
    torch.cuda.synchronize()
    origin = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {STEPS} steps of {name}"
    return document(recording_torch_private.memory_snapshot_with_history(), torch.cuda.memory_stats(device), origin)


def _kept(found: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=sorted(RECORDED), help="record this one only, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("recording needs a CUDA device, and torch sees none here")
    if options.name is None:
        for name in RECORDED:
            subprocess.run([sys.executable, "-m", "benchmarks.record_gpu_traces", name], check=True)
        return 0
    path = FIXTURES / f"{options.name}.json"
    path.write_text(json.dumps(record(options.name), separators=(",", ":")) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

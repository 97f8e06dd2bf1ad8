"""How long a simulated plan takes, beside torch's own MemTracker on the same fake step.

    python -m benchmarks.plan [--results DIRECTORY]
    python -m benchmarks.plan --commands --before SOURCES --before-version NAME

Plans Llama 3 with 8, 70 and 405 billion parameters, 2048 tokens, bfloat16 and AdamW, each in a process of its own,
after imports; then runs a step of the 8B model under MemTracker on fake tensors, with the same model code, batch and
optimizer, and the same step without it. A plan runs two steps and replays them through a model of CUDA's allocator;
MemTracker takes one step only. Runs of the 8B plan and of MemTracker alternate, and the best of each counts. Fails
where a limit is not kept.

With `--commands` it measures `memtrace plan --what-if` and `--fsdp --world-size 8` for the 8B model instead, imports
and all: each alternates with the same command of other sources (`--before`, the `src` of another checkout, whose
version is `--before-version`), and what both print must be the same. The processor's time counts, since both wait for
the machine alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import environment, write
from memtrace import plan

TOKENS = 2048
LIMITS = {"plan-8B": 3.0, "plan-70B": 8.0, "plan-405B": 15.0}
"""Seconds that a plan may take."""
MEMORY_LIMIT_BYTES = 1.5e9
"""Largest resident set of a process that plans."""
RATIO_LIMIT = 5.0
"""How many times longer MemTracker must take than the plan of the same model."""
ROUNDS = 2
"""How often the plan of 8B and MemTracker run, in turn."""

COMMANDS = {
    "memtrace plan --what-if": ["--recipe", "bf16-master", "--batch-size", "2", "--what-if"],
    "memtrace plan --fsdp --world-size 8": ["--recipe", "hf-autocast", "--fsdp", "--world-size", "8"],
}
"""What is measured with `--commands`, each for the 8B model."""

SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def llama(size: str) -> LlamaForCausalLM:
    """Returns Llama 3 of a size, on the default device."""
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128256, num_key_value_heads=8, use_cache=False, dtype="bfloat16", **SIZES[size])
    )


def batch() -> dict[str, torch.Tensor]:
    """Returns one sample of 2048 tokens."""
    ids = torch.ones(1, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def run_plan(size: str, device: str) -> dict[str, Any]:
    """Plans; returns what was planned."""
    planned = plan(lambda: llama(size), batch, recipe="pure-bf16", device=device)
    return {"parameters": planned.setup["parameters"], "peak_bytes": planned.total_bytes}


def run_step(*, tracked: bool) -> dict[str, Any]:
    """Runs one step of the 8B model on fake tensors, under MemTracker or not."""
    with torch.device("meta"):
        model = llama("8B").to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker = MemTracker() if tracked else None
        if tracker is not None:
            tracker.track_external(model, optimizer)
        with tracker or nullcontext():
            model(**{name: tensor.clone() for name, tensor in batch().items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = None if tracker is None else tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "peak_bytes": peak}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "plan-8B": partial(run_plan, "8B", "cuda"),
    "plan-8B-cpu": partial(run_plan, "8B", "cpu"),
    "plan-70B": partial(run_plan, "70B", "cuda"),
    "plan-405B": partial(run_plan, "405B", "cuda"),
    "memtracker-8B": partial(run_step, tracked=True),
    "fake-step-8B": partial(run_step, tracked=False),
}


def timed(name: str) -> dict[str, Any]:
    """Returns seconds after imports, largest resident set and result of one run in this process."""
    begin = time.perf_counter()
    found = RUNS[name]()
    seconds = time.perf_counter() - begin
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"run": name, "seconds": seconds, "resident_bytes": resident, **found}


def in_process(name: str) -> dict[str, Any]:
    """Returns the same of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--run", name]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def command(sources: Path, configuration: Path, options: Sequence[str]) -> tuple[float, str]:
    """Returns the processor's seconds of one `memtrace plan` with these sources, and what it prints."""
    arguments = [sys.executable, "-m", "memtrace", "plan", "--config", str(configuration), *options, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(sources)}
    finished = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, finished.stdout


def compare_commands(before: Path) -> dict[str, Any]:
    """Returns the seconds of each command with these and with other sources, the best of some turns, and the ratio."""
    now, commands = Path(__file__).parents[1] / "src", {}
    with tempfile.TemporaryDirectory() as directory:
        configuration = Path(directory) / "config.json"
        sizes = {"vocab_size": 128256, "num_key_value_heads": 8, **SIZES["8B"]}
        configuration.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
        for name, options in COMMANDS.items():
            turns = [[command(path, configuration, options) for path in (before, now)] for _ in range(ROUNDS)]
            old, new = (min(seconds for seconds, _ in of_one) for of_one in zip(*turns, strict=True))
            same = len({printed for turn in turns for _, printed in turn}) == 1
            commands[name] = {"before_seconds": old, "seconds": new, "ratio": old / new, "same": same}
    return {"commands": commands}


def compare() -> dict[str, Any]:
    """Returns every run, MemTracker's ratio to the plan of the same model, and whether the limits were kept."""
    order = ["plan-8B", "memtracker-8B"] * ROUNDS + ["plan-8B-cpu", "fake-step-8B", "plan-70B", "plan-405B"]
    runs = [in_process(name) for name in order]
    best = {name: min(run["seconds"] for run in runs if run["run"] == name) for name in RUNS}
    plans = [run for run in runs if run["run"].startswith("plan")]
    ratio = best["memtracker-8B"] / best["plan-8B"]
    kept = {
        **{name: best[name] <= limit for name, limit in LIMITS.items()},
        "memtracker_ratio": ratio >= RATIO_LIMIT,
        "resident_bytes": max(run["resident_bytes"] for run in plans) <= MEMORY_LIMIT_BYTES,
    }
    limits = {**LIMITS, "memtracker_ratio": RATIO_LIMIT, "resident_bytes": MEMORY_LIMIT_BYTES}
    return {"runs": runs, "seconds": best, "memtracker_ratio": ratio, "limits": limits, "kept": kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=sorted(RUNS), help="take one run in this process, and print it")
    parser.add_argument("--commands", action="store_true", help="measure the commands, beside those of --before")
    parser.add_argument("--before", type=Path, help="sources of another checkout, its src")
    parser.add_argument("--before-version", help="what those are called on the page")
    parser.add_argument("--results", type=Path, help="directory to write the result to instead")
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(timed(options.run)))
        return 0
    measured_on = environment(torch.device("cpu"))
    if options.commands:
        if options.before is None or options.before_version is None:
            parser.error("--commands needs --before and --before-version")
        found = {"before": options.before_version, **compare_commands(options.before)}
        for name, row in found["commands"].items():
            print(
                f"{name:<36} {row['before_seconds']:6.1f} s before, {row['seconds']:6.1f} s now: 1 / {row['ratio']:.2f}"
            )
        print(write("plan-commands", found, measured_on, options.results))
        return 0 if all(row["same"] for row in found["commands"].values()) else 1
    found = compare()
    for run in found["runs"]:
        print(f"{run['run']:<14} {run['seconds']:6.2f} s  {run['resident_bytes'] / 1e9:.2f} GB resident")
    print(f"MemTracker takes {found['memtracker_ratio']:.1f} times as long as the plan (at least {RATIO_LIMIT:.0f})")
    print("limits:", ", ".join(f"{name} {'kept' if ok else 'NOT KEPT'}" for name, ok in found["kept"].items()))
    print(write("plan", found, measured_on, options.results))
    return 0 if all(found["kept"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

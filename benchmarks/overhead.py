"""What memtrace costs a training step, beside the tools that one would use in its place.

usage: python -m benchmarks.overhead WORKLOAD [--short] [--seconds S] [--variants NAME,NAME]

Prints a table of ratios to the same training without anything, and writes them to benchmarks/results/, each row as soon
as it is measured. Each variant runs in a process of its own, in turns with the plain training: it does not meet what
another tool has left behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.interleave import interleave
from benchmarks.ratios import Ratio, compare
from benchmarks.results import environment, write
from benchmarks.variants import NOTHING, VARIANTS, Variant
from benchmarks.workloads import WORKLOADS, Workload

BOUNDS = {
    ("tiny", "default"): 1.02,
    ("llama", "default"): 1.005,
    ("llama", "every_step"): 1.10,
    ("minilm", "default"): 1.005,
    ("llama1b", "default"): 1.005,
    ("llama1b", "every_step"): 1.3,
}
"""What a ratio may be at most."""

SECONDS = 300
"""How long a workload is measured, after the warm-ups."""

SHORT_VARIANTS = ("control", "default", "every_step")
SHORT_SECONDS = 36
"""The short form: memtrace alone. On a GPU each of the three processes needs some 20 seconds besides."""

Row = Mapping[str, Any]


def measure(workload: Workload, variant: Variant, *, device: torch.device, seconds: float) -> Row:
    """Returns the ratio of one variant to nothing, measured in this process."""
    with tempfile.TemporaryDirectory() as directory:
        blocks = interleave(workload, [NOTHING, variant], device=device, seconds=seconds, directory=Path(directory))
    nothing = blocks[NOTHING.name]
    return {
        "variant": variant.name,
        "title": variant.title,
        **asdict(compare(blocks[variant.name], nothing)),
        "step_seconds": median(block.step_seconds for block in nothing.values()),
        "bound": BOUNDS.get((workload.name, variant.name)),
    }


def measure_apart(workload: Workload, variants: Sequence[Variant], *, seconds: float) -> Iterator[Row]:
    """Yields the ratio of each variant, measured in a process of its own, one after the other.

    A variant whose process fails has no row; its own messages are on stderr.
    """
    shares = sum(variant.share for variant in variants)
    for variant in variants:
        command = [sys.executable, "-m", "benchmarks.overhead", workload.name, "--here"]
        command += ["--variants", variant.name, "--seconds", str(seconds * variant.share / shares)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
        if done.returncode:
            print(f"  {variant.name}: its process ended with {done.returncode}", file=sys.stderr)
        else:
            yield from json.loads(done.stdout.splitlines()[-1])


def result(workload: Workload, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what was measured of one workload, as it is written."""
    return {
        "workload": workload.name,
        "title": workload.title,
        "step_seconds": median(row["step_seconds"] for row in rows),
        "ratios": rows,
    }


def verdict(row: Row) -> str:
    """Returns whether a ratio keeps its bound, as far as the run can tell; nothing where it has none."""
    bound, (low, high) = row["bound"], row["interval"]
    if bound is None:
        return ""
    return "kept" if high <= bound else "NOT KEPT" if low > bound else "cannot be told"


def show(row: Row) -> None:
    """Prints the ratios of one variant."""
    ratio = Ratio(**{name: row[name] for name in Ratio.__dataclass_fields__})
    parts = " ".join(
        f"{name} {value:.4f}" for name, value in (("untraced", ratio.untraced), ("traced", ratio.traced)) if value
    )
    held = f"  at most {row['bound']}: {verdict(row)}" if verdict(row) else ""
    print(
        f"  {row['variant']:<17} {ratio.ratio:7.4f}  95 % {ratio.interval[0]:.4f}..{ratio.interval[1]:.4f}"
        f"  quartiles {ratio.quartiles[0]:.4f}..{ratio.quartiles[1]:.4f}  total {ratio.total:.4f}  {parts}"
        f"  {ratio.traced_steps} of {ratio.steps} steps traced, {row['step_seconds'] * 1e3:.3g} ms a step{held}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--short", action="store_true", help="memtrace alone, in less than two minutes")
    parser.add_argument("--seconds", type=float, help=f"how long to measure, after the warm-ups; by default {SECONDS}")
    parser.add_argument("--variants", help="names to take beside nothing, with commas; all by default")
    parser.add_argument("--results", type=Path, help="directory to write the result to instead")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {variant.name: variant for variant in VARIANTS}
    names = options.variants.split(",") if options.variants else SHORT_VARIANTS if options.short else list(known)
    seconds = options.seconds
    if seconds is None:
        seconds = SHORT_SECONDS if options.short else SECONDS
    if unknown := set(names) - set(known):
        parser.error(f"there is no variant {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    variants = [known[name] for name in names]
    workload = WORKLOADS[options.workload]
    device = torch.device(workload.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"{workload.name} needs a CUDA device, and torch sees none here: `make bench` runs on a CPU")
    if options.here:
        print(json.dumps([measure(workload, variant, device=device, seconds=seconds) for variant in variants]))
        return 0
    name = f"overhead-{workload.name}{'-short' if options.short else ''}"
    print(f"{workload.title}, beside the same training without anything:", flush=True)
    rows: list[Row] = []
    for row in measure_apart(workload, variants, seconds=seconds):
        show(row)
        rows.append(row)
        path = write(name, result(workload, rows), environment(device), options.results)
        print(f"  written to {path}", flush=True)
    complete = len(rows) == len(variants)
    return 0 if complete and all(verdict(row) != "NOT KEPT" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""How long a simulated plan takes, beside torch's own MemTracker on the same fake step.

usage: python benchmarks/plan.py [--without-memtracker]

Prints seconds after imports and the process's largest resident set for plans of Llama 3 with 8, 70 and 405 billion
parameters at 2048 tokens, bfloat16 and AdamW, then the time of one step of the 8B model under MemTracker. A plan runs
two steps, MemTracker one: it does not take a second one.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import memtrace

TOKENS = 2048
LIMITS = {"8B": 3.0, "70B": 8.0, "405B": 15.0}
"""Seconds that a plan may take."""
MEMORY_LIMIT_GB = 1.5
MEMTRACKER_RATIO = 5.0
"""How many times longer MemTracker must take than the plan."""

SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def llama(size: str) -> torch.nn.Module:
    """Returns Llama 3 of a size, on the default device."""
    config = transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, use_cache=False, **SIZES[size])
    return transformers.LlamaForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.ones(1, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def plan(size: str) -> float:
    """Returns the seconds that a plan takes."""
    begin = time.perf_counter()
    memtrace.plan(lambda: llama(size), batch, recipe="pure-bf16")
    return time.perf_counter() - begin


def memtracker() -> float:
    """Returns the seconds that MemTracker takes for one step of the 8B model on fake tensors."""
    begin = time.perf_counter()
    with torch.device("meta"):
        model = llama("8B").to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(**{name: tensor.clone() for name, tensor in batch().items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-memtracker", action="store_true", help="leave the comparison out")
    arguments = parser.parse_args()
    kept = True
    seconds = {}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for size, limit in LIMITS.items():
        seconds[size] = plan(size)
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        kept &= seconds[size] <= limit and peak_gb <= MEMORY_LIMIT_GB
        print(f"plan {size:>5}: {seconds[size]:6.2f} s (limit {limit:.0f} s), {peak_gb:.2f} GB resident")
    if not arguments.without_memtracker:
        other = memtracker()
        ratio = other / seconds["8B"]
        kept &= ratio >= MEMTRACKER_RATIO
        print(
            f"MemTracker, one step of 8B: {other:.1f} s, {ratio:.0f} times the plan (at least {MEMTRACKER_RATIO:.0f})"
        )
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())

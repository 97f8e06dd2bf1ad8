"""Records the case of the README on a CUDA device: Llama-3-8B with float32 masters and moments, six steps.

usage: python -m benchmarks.record_gpu_run DIRECTORY

Writes what a run writes (step log, timeline), the table, a scrape and what torch itself counted. It takes 133 GB and
half a minute. `docs/build_picture.py DIRECTORY/steps-rank0.jsonl` draws the picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrace import MemTraceOptimizer
from memtrace.exporters.prometheus import render_text as render_metrics
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.table import TABLE_WIDTH, render_text

STEPS = 6
TOKENS = (1, 1024)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 copies of 16-bit weights, which it keeps in its state, one parameter at a time."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float = 1e-5) -> None:
        super().__init__(parameters, {"lr": learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Updates the masters and copies them to the weights."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["master_param"] = parameter.detach().float()
                    state["exp_avg"] = torch.zeros_like(state["master_param"])
                    state["exp_avg_sq"] = torch.zeros_like(state["master_param"])
                state["step"] += 1
                gradient, master = parameter.grad.float(), state["master_param"]
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
                master.mul_(1 - group["lr"] * group["weight_decay"])
                master.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first ** state["step"]))
                parameter.copy_(master)


def llama_3_8b(device: torch.device) -> nn.Module:
    """Returns Llama-3-8B in bfloat16 with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # built in float32 first, it would be the peak
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def record(model: nn.Module, directory: Path, *, vocabulary: int, tokens: tuple[int, int]) -> dict[str, Any]:
    """Trains some steps with memtrace's default settings and returns what torch counted of them."""
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, tokens, device=device)
    seconds = []
    with MemTraceOptimizer(
        MasterAdamW(model.parameters()), model, log_dir=directory, run_name="llama-3-8b", port=0
    ) as optimizer:
        for _ in range(STEPS):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        (directory / "metrics.txt").write_text(render_metrics(optimizer.tracer.snapshot()), encoding="utf-8")
    facts: dict[str, Any] = {"parameters": sum(part.numel() for part in model.parameters()), "step_s": seconds}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        facts |= {
            "max_allocated": stats["allocated_bytes.all.peak"],
            "max_reserved": stats["reserved_bytes.all.peak"],
            "peak_requested": stats["requested_bytes.all.peak"],
        }
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("recording needs a CUDA device, and torch sees none here")
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "steps-rank0.jsonl").unlink(missing_ok=True)  # a log is continued where there is one
    torch.manual_seed(0)
    model = llama_3_8b(torch.device("cuda", 0))
    write(record(model, options.directory, vocabulary=128_256, tokens=TOKENS), options.directory)
    return 0


def write(facts: dict[str, Any], directory: Path) -> None:
    """Writes what torch counted, and the table of the traced step."""
    (directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    traced = [found for found in read_step_log(directory / "steps-rank0.jsonl") if found.traced]
    table = render_text(traced[-1], TABLE_WIDTH)
    (directory / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    raise SystemExit(main())

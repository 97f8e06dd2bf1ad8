"""The recording of Llama-3-8B, with a model that fits a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record_gpu_run import STEPS, MasterAdamW, record, write
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.categories import Category, Moment


def small() -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_the_recording_has_all_its_files(tmp_path: Path) -> None:
    """Step log, table, scrape and facts; masters and moments are categories of their own, in float32."""
    facts = record(small(), tmp_path, vocabulary=96, tokens=(1, 8))
    write(facts, tmp_path)
    records = list(read_step_log(tmp_path / "steps-rank0.jsonl"))
    assert len(records) == len(json.loads((tmp_path / "facts.json").read_text())["step_s"]) == STEPS
    end = next(found for found in records if found.traced).moments[Moment.STEP_END]
    assert end[Category.MASTER_WEIGHTS] == 2 * end[Category.WEIGHTS] == 4 * facts["parameters"]
    assert end[Category.OPTIMIZER_STATE] >= 8 * facts["parameters"]
    assert "master_weights" in (tmp_path / "table.txt").read_text()
    assert "memtrace_up" in (tmp_path / "metrics.txt").read_text()


def test_the_optimizer_does_what_adamw_does() -> None:
    """Three steps on float32 weights, whose copies are exact, end where torch's AdamW ends."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    optimizers = [MasterAdamW(ours.parameters(), 1e-2), torch.optim.AdamW(theirs.parameters(), **settings)]
    for _ in range(3):
        batch = torch.randn(5, 4)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())

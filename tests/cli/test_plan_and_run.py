"""From the plan to the run: what `memtrace plan --config` wrote is exported and compared beside what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_plan_simulated import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

import memtrace
from memtrace import MemTraceOptimizer
from memtrace.cli import main
from memtrace.exporters.prometheus import render_text
from memtrace.record.categories import PERSISTENT, Category
from memtrace.record.plan import read_plan

CONFIG = {**LLAMA, "use_cache": False}
SAMPLES, POSITIONS = 4, 32


@pytest.fixture
def plan_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The plan of a small Llama on a CPU, as the command writes it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    size = ["--batch-size", str(SAMPLES), "--seq-len", str(POSITIONS)]
    assert main(["plan", "--config", str(tmp_path), *size, "--recipe", "fp32", "--kernels", "cpu", "--json"]) == 0
    path = tmp_path / "plan.json"
    path.write_text(capsys.readouterr().out)
    return path


def model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def batch() -> dict[str, torch.Tensor]:
    words = torch.full((SAMPLES, POSITIONS), 3, dtype=torch.long)
    return {"input_ids": words, "labels": words.clone()}


def test_command_and_function_plan_the_same(plan_file: Path) -> None:
    """`memtrace plan --config` and `memtrace.plan` with the same model and batch agree to the byte."""
    by_function = memtrace.plan(lambda: model(plan_file.parent), batch, recipe="fp32", device="cpu")
    assert read_plan(plan_file).moments == by_function.moments


def test_plan_is_held_against_the_run(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned and measured have the same labels in the metrics; `memtrace compare` shows how little they differ."""
    logs = plan_file.parent / "logs"
    net = model(plan_file.parent)
    optimizer = torch.optim.AdamW(net.parameters())
    settings: dict[str, Any] = {"plan": plan_file, "port": None, "log_dir": logs, "strict": True, "trace_every": 1}
    with MemTraceOptimizer(optimizer, net, **settings) as wrapped:
        for _ in range(3):
            net(**batch()).loss.backward()
            wrapped.step()
            wrapped.zero_grad()
        text = render_text(wrapped.tracer.snapshot())

    planned, measured = (
        {labels: float(value) for labels, value in re.findall(rf"^{name}{{(.*?)}} (\S+)$", text, re.MULTILINE)}
        for name in ("memtrace_plan_bytes", "memtrace_memory_bytes")
    )
    for category in (Category.WEIGHTS, Category.OPTIMIZER_STATE):
        rows = {labels for labels in planned if f'category="{category}"' in labels and 'dtype="float32"' in labels}
        assert rows, category
        assert {labels: planned[labels] for labels in rows} == {labels: measured[labels] for labels in rows}

    assert main(["compare", str(plan_file), str(logs), "--json"]) == 0
    moments = json.loads(capsys.readouterr().out)["moments"]
    assert set(moments) == {"forward_end", "backward_end", "step_end", "peak"}
    *categories, total = moments["peak"]
    assert total["measured_bytes"] == pytest.approx(total["planned_bytes"], rel=0.01)
    for row in categories:
        if row["category"] in (*PERSISTENT, Category.ACTIVATIONS):
            assert row["difference_bytes"] == 0, row

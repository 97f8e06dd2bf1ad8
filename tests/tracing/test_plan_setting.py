"""The `plan` setting: a plan file is shown beside what is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memtrace import MemTraceError, MemTraceOptimizer
from memtrace.exporters.prometheus import render_text

PLAN = {
    "schema": "memtrace.plan/1",
    "recipe": "fp32",
    "assumptions": ["made by hand"],
    "total_bytes": 96,
    "moments": {
        "peak": {
            "allocated_bytes": 96,
            "entries": [
                {"category": "weights", "component": "trainable", "dtype": "float32", "bytes": 64},
                {"category": "gradients", "component": "", "dtype": "float32", "bytes": 32},
            ],
        }
    },
    "reserved_bytes": None,
    "verdict": None,
}


def traced_with(plan: Path) -> str:
    """Returns the exposition after two steps of a small model with this plan."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemTraceOptimizer(optimizer, model, plan=plan, port=None, step_log=False, strict=True) as wrapped:
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            wrapped.step()
            wrapped.zero_grad()
        return render_text(wrapped.tracer.snapshot())


def series(text: str, name: str) -> dict[str, float]:
    found = re.findall(rf"^{name}{{(.*?)}} (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def test_plan_is_exported_beside_the_measurement(tmp_path: Path) -> None:
    """`memtrace_plan_bytes` has the labels of `memtrace_memory_bytes`, so that the two compare by subtraction."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN))
    text = traced_with(path)
    plan, measured = series(text, "memtrace_plan_bytes"), series(text, "memtrace_memory_bytes")
    assert sorted(plan.values()) == [32, 64]
    weights = next(labels for labels in plan if 'category="weights"' in labels)
    assert weights in measured, "the same labels, moment included"
    assert plan[weights] == measured[weights]


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "memtrace.step/1"}', "[1]"])
def test_file_that_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    """One clear error that names the file, before training."""
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(MemTraceError, match=r"plan\.json"):
        traced_with(path)


def test_missing_plan_file_is_refused(tmp_path: Path) -> None:
    """The same for a file that is not there."""
    with pytest.raises(MemTraceError, match=r"nowhere\.json"):
        traced_with(tmp_path / "nowhere.json")

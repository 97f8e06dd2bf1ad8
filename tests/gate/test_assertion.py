"""`assert_peak` and `memory_plan` in tests, and the plugin that pytest loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtrace import assert_peak, memory_plan
from memtrace.errors import ConfigError, PlanError
from memtrace.record.categories import Moment

ROOT = Path(__file__).parents[2]


class Classifier(nn.Module):
    """Two layers that share one weight, a buffer, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(64))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.second(self.first(features).relu() * self.scale), features)


def batch() -> torch.Tensor:
    return torch.zeros(32, 64)


def test_a_peak_within_the_bound_passes_and_gives_the_plan() -> None:
    """The bound itself is within; a function and the model that it makes are the same plan."""
    result = memory_plan(Classifier, batch, recipe="fp32", optimizer="sgd")
    assert assert_peak(Classifier, batch(), optimizer="sgd", at_most=result.peak_bytes) == result
    model = Classifier()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert memory_plan(model, batch(), optimizer="sgd") == result
    assert model.second.weight is model.first.weight and all(not tensor.is_meta for tensor in model.parameters())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    weights = result.modules[Moment.PEAK]["weights trainable float32"]
    assert weights == {"first": 4 * (64 * 64 + 64), "second": 4 * 64}


def test_a_peak_over_the_bound_names_category_and_module() -> None:
    """The largest parts first; what is listed and the rest are the whole peak."""
    bound = memory_plan(Classifier, batch).peak_bytes - 1
    with pytest.raises(AssertionError) as raised:
        assert_peak(Classifier, batch, at_most=bound)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("the peak is 16.") and f"({bound + 1:,} bytes), 1 B over the bound of" in first
    assert "  16.25 KiB weights trainable float32 of first" in lines
    assert "  16.25 KiB optimizer_state exp_avg float32 of first" in lines
    assert re.fullmatch(r"  .* of \d+ others", lines[-1])


def test_what_cannot_be_planned_is_no_failure_of_the_bound() -> None:
    """A wrong bound, a batch that the model refuses."""
    with pytest.raises(ConfigError, match="a size must be a number and a unit"):
        assert_peak(Classifier, batch, at_most="large")
    with pytest.raises(PlanError, match="the model refused the batch"):
        assert_peak(Classifier, torch.zeros(32, 63), at_most="1GiB")


@pytest.mark.parametrize("recipe", ["bf16-master", "hf-autocast", "megatron", "pure-bf16"])
def test_every_recipe_has_its_states_by_module(recipe: str) -> None:
    """Weights, copies, states: by the parameter that they are kept for, however the recipe updates it."""
    held = memory_plan(Classifier, batch, recipe=recipe).modules[Moment.STEP_END]
    states = {entry: sizes for entry, sizes in held.items() if entry.startswith(("weights", "master", "optimizer"))}
    assert states and all({*sizes} <= {"first", "second"} for sizes in states.values()), states


def test_pytest_has_the_fixture_and_loads_no_torch_for_it(tmp_path: Path) -> None:
    """The entry point of the project is loaded by a pytest of its own; a test that does not plan pays nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    installed = tmp_path / "installed"
    (installed / "memtrace_plugin-1.dist-info").mkdir(parents=True)
    (installed / "memtrace_plugin-1.dist-info" / "METADATA").write_text("Name: memtrace-plugin\nVersion: 1\n")
    points = "".join(f"{name} = {target}\n" for name, target in project["project"]["entry-points"]["pytest11"].items())
    (installed / "memtrace_plugin-1.dist-info" / "entry_points.txt").write_text(f"[pytest11]\n{points}")
    (tmp_path / "test_one.py").write_text(
        "import sys\n"
        "def test_nothing_is_loaded():\n"
        "    assert 'memtrace.adapters.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'transformers', 'memtrace.planning', 'rich'} & set(sys.modules)\n"
        "def test_a_plan(memory_plan):\n"
        "    from torch import nn, ones\n"
        "    build = lambda: nn.Linear(4, 1)\n"
        "    assert memory_plan(build, ones(1, 4), loss=lambda model, batch: model(batch).sum()).peak_bytes > 0\n"
    )
    path = os.pathsep.join([str(installed), str(ROOT / "src")])
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "memtrace", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # others' may load torch
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

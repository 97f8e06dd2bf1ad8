"""What a new user writes in the first minutes: settings, mistakes, what the run says, a notebook's cells."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from nothing_left import memtrace_threads
from torch import nn

from memtrace import (
    ConfigError,
    MemoryTracer,
    MemTraceCallback,
    MemTraceLightningCallback,
    MemTraceOptimizer,
    TracerConfig,
)

NOWHERE: dict[str, Any] = {"port": None, "step_log": False, "oom_reports": 0, "device_poll_seconds": 0}


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()


class TestSettings:
    """They are keyword arguments of all ways, with the same names."""

    def test_of_a_tracer(self) -> None:
        """Those of a configuration are replaced by what is named beside it."""
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters())
        alone = MemoryTracer(model, optimizer, port=None, log_dir="here", run_name="mine")
        assert (alone.config.port, alone.config.log_dir, alone.config.run_name) == (None, "here", "mine")
        both = MemoryTracer(model, optimizer, TracerConfig(port=7, trace_every=3), port=9)
        assert (both.config.port, both.config.trace_every) == (9, 3)
        with MemTraceOptimizer(optimizer, model, trace_every=5, **NOWHERE) as wrapper:
            assert wrapper.tracer.config.trace_every == 5

    @pytest.mark.parametrize(
        "way",
        [
            MemTraceCallback,
            MemTraceLightningCallback,
            lambda **settings: tracer_of("MemoryTracer", **settings),
            lambda **settings: tracer_of("MemTraceOptimizer", **settings),
        ],
        ids=["Trainer", "Lightning", "tracer", "wrapper"],
    )
    def test_that_are_wrong(self, way: Callable[..., object]) -> None:
        """Each way says what to write instead, before anything is opened."""
        for settings, message in (
            ({"trace_evry": 3}, "unknown setting 'trace_evry': did you mean 'trace_every'?"),
            ({"port": "16368"}, "port must be 0..65535, got '16368': write 16368"),
            ({"device_limit_bytes": 12e9}, "device_limit_bytes must be .*, got 12000000000.0: write 12000000000"),
            ({"device_limit_bytes": "24GiB"}, "device_limit_bytes must be .*, got '24GiB': write 25769803776"),
            ({"overhead_budget": "1%"}, "overhead_budget must be [01.]+, got '1%': write 0.01"),
        ):
            with pytest.raises(ConfigError, match=f"^{message.replace('?', '[?]')}$"):
                way(**settings)


def tracer_of(way: str, **settings: Any) -> object:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    if way == "MemoryTracer":
        return MemoryTracer(model, optimizer, **settings)
    return MemTraceOptimizer(optimizer, model, **settings)


MISTAKES: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "swapped": (
        lambda model, optimizer: MemoryTracer(optimizer, model, **NOWHERE),
        "got AdamW, an optimizer: model and optimizer are swapped, write MemoryTracer(model, optimizer) or "
        "MemTraceOptimizer(optimizer, model)",
    ),
    "swapped in the wrapper": (
        lambda model, optimizer: MemTraceOptimizer(model, optimizer, **NOWHERE),
        "got AdamW, an optimizer: model and optimizer are swapped, write MemoryTracer(model, optimizer) or "
        "MemTraceOptimizer(optimizer, model)",
    ),
    "parameters for the model": (
        lambda model, optimizer: MemoryTracer(model.parameters(), optimizer, **NOWHERE),
        "got generator: write model, not model.parameters()",
    ),
    "listed parameters for the model": (
        lambda model, optimizer: MemTraceOptimizer(optimizer, list(model.parameters()), **NOWHERE),
        "got list: write model, not model.parameters()",
    ),
    "state for the model": (
        lambda model, optimizer: MemoryTracer(model.state_dict(), optimizer, **NOWHERE),
        "got OrderedDict: write model, not model.state_dict()",
    ),
    "parameters for the optimizer": (
        lambda model, _: MemoryTracer(model, model.parameters(), **NOWHERE),
        "got generator: write the optimizer, not model.parameters()",
    ),
    "parameters for the wrapped optimizer": (
        lambda model, _: MemTraceOptimizer(model.parameters(), model, **NOWHERE),
        "MemTraceOptimizer wraps an optimizer, got generator: write the optimizer, not model.parameters()",
    ),
    "listed parameters for the wrapped optimizer": (
        lambda model, _: MemTraceOptimizer([*model.parameters()], model, **NOWHERE),
        "MemTraceOptimizer wraps an optimizer, got list: write the optimizer, not model.parameters()",
    ),
    "the model twice": (
        lambda model, _: MemoryTracer(model, model, **NOWHERE),
        "got Sequential, a module: write MemTraceOptimizer(optimizer, model)",
    ),
    "a list of models": (
        lambda model, optimizer: MemoryTracer([model], optimizer, **NOWHERE),
        "got list of modules: write nn.ModuleList([...])",
    ),
    "named models": (
        lambda model, optimizer: MemoryTracer({"student": model}, optimizer, **NOWHERE),
        "got dict of modules: write nn.ModuleDict(...)",
    ),
    "a class of models": (
        lambda _, optimizer: MemoryTracer(nn.Linear, optimizer, **NOWHERE),
        "got the class Linear: write the module itself, Linear(...)",
    ),
    "a class of optimizers": (
        lambda model, _: MemoryTracer(model, torch.optim.AdamW, **NOWHERE),
        "got the class AdamW: write the optimizer itself, AdamW(model.parameters(), ...)",
    ),
    "a class of optimizers in the wrapper": (
        lambda model, _: MemTraceOptimizer(torch.optim.AdamW, model, **NOWHERE),
        "got the class AdamW: write AdamW(...) itself",
    ),
    "a dictionary of settings": (
        lambda model, optimizer: MemoryTracer(model, optimizer, NOWHERE),
        "config must be a TracerConfig, got dict: write settings as keywords, such as port=0",
    ),
    "a configuration as a setting": (
        lambda *_: MemTraceCallback(config=TracerConfig()),
        "unknown setting 'config': write the fields themselves, such as port=0",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(name: str) -> None:
    """The message says what was given, and the words that belong there."""
    mistake, message = MISTAKES[name]
    model = make_model()
    with pytest.raises(ConfigError) as caught:
        mistake(model, torch.optim.AdamW(model.parameters()))
    assert str(caught.value).endswith(message)


TWO_LOOPS = """
import torch
from memtrace import MemoryTracer, MemTraceOptimizer
from small_training import make, step

model, optimizer = make()
with MemoryTracer(model, optimizer, port=0, trace_every=1):
    step(model, optimizer)
    step(model, optimizer)
model, _ = make()
optimizer = MemTraceOptimizer(torch.optim.SGD(model.parameters(), momentum=0.9), model, port=None, run_name="two")
step(model, optimizer)
step(model, optimizer)
"""


def test_a_plain_loop_says_where_its_metrics_are_and_shows_its_table(tmp_path: Path) -> None:
    """One line at the begin, the table at the end of the block or of the process; of torch's own lines none."""
    (tmp_path / "one.py").write_text(TWO_LOOPS)
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "one.py"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    said = done.stderr
    at = r"metrics at http://127\.0\.0\.1:\d+/metrics, step log memtrace-runs/one/steps-rank0\.jsonl"
    tables = r"(?:step (\d) [^\n]* traced [^\n]*\n(?:[^\n]*\n)*?\ndevice [^\n]*\n)"
    assert re.fullmatch(
        rf"memtrace: {at}\n{tables}memtrace: step log memtrace-runs/two/steps-rank0\.jsonl\n{tables}", said
    ), said
    assert said.count("exp_avg_sq") == said.count("momentum_buffer") == 1


def test_when_nothing_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `quiet`, on other ranks of the machine, and no table where an exception has ended the run.

    Without a stderr neither: stdout, where tqdm would write to, is the script's own.
    """
    importlib.import_module("tqdm")
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {**NOWHERE, "trace_every": 1}
    with MemoryTracer(model, optimizer, quiet=True, **settings):
        train(model, optimizer)
    with pytest.raises(KeyboardInterrupt), MemoryTracer(model, optimizer, **settings):
        train(model, optimizer)
        raise KeyboardInterrupt
    with monkeypatch.context() as launched:
        for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
            launched.setenv(name, value)
        with MemoryTracer(model, optimizer, **settings):
            train(model, optimizer)
    assert capsys.readouterr().err == ""
    with MemoryTracer(model, optimizer, **settings):
        train(model, optimizer)
    assert "optimizer_state" in capsys.readouterr().err
    closed = io.StringIO()
    closed.close()
    for gone in (None, closed):
        monkeypatch.setattr(sys, "stderr", gone)
        with MemTraceOptimizer(optimizer, model, **settings):
            train(model, optimizer)
        monkeypatch.undo()
        assert capsys.readouterr() == ("", "")


CELL = """
model = make_model()
optimizer = torch.optim.AdamW(model.parameters())
optimizer = MemTraceOptimizer(optimizer, model, port=0, device_poll_seconds=0.05)
train(model, optimizer, 2)
if interrupted:
    raise KeyboardInterrupt
"""
IN_ONE_LINE = """
model = make_model()
optimizer = MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, port=0, device_poll_seconds=0.05)
train(model, optimizer, 2)
"""
WRAPPED_AGAIN = """
optimizer = MemTraceOptimizer(optimizer, model, port=0, device_poll_seconds=0.05)
train(model, optimizer, 2)
"""


THREADS = ["memtrace-device-sampler", "memtrace-metrics", "memtrace-termination"]


def test_a_cell_that_is_run_again_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither model, thread nor port of the execution before; each execution has a name and a launch of its own."""
    shell = SimpleNamespace(execution_count=0)
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(sys, "argv", ["/somewhere/ipykernel_launcher.py"])
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/mnist.ipynb")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {**globals(), "interrupted": False}
    models: list[weakref.ref[nn.Module]] = []
    for cell in (CELL, CELL, "interrupted = True\n" + CELL, IN_ONE_LINE, IN_ONE_LINE, WRAPPED_AGAIN, WRAPPED_AGAIN):
        shell.execution_count += 1
        try:
            exec(cell, names)
        except KeyboardInterrupt:
            names["interrupted"] = False
        models.append(weakref.ref(names["model"]))
        assert {id(model()) for model in models if model() is not None} == {id(names["model"])}
        # Nobody waits for the threads of a tracer that was collected: they end by themselves.
        deadline = time.monotonic() + 60
        while (running := sorted(running_threads())) != THREADS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running == THREADS
        identity = names["optimizer"].tracer.identity
        assert identity.run_name == f"mnist-{shell.execution_count}"
        assert identity.run_id.endswith(f"-cell{shell.execution_count}")
    names["optimizer"].close()
    assert memtrace_threads() == []
    assert sorted(path.name for path in (tmp_path / "memtrace-runs").iterdir()) == [f"mnist-{n}" for n in range(1, 8)]


def running_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("memtrace")]

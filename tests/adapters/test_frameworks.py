"""A fine-tune from YAML by the framework's own command. TRL's is installed here; `make frameworks` runs the others."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from versions.frameworks import EXAMPLES, NO_DEVICE, OUTPUT, ROOT, checked


def test_trl_sft_is_traced_without_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`memtrace run trl sft --config trl.yaml`: every step has a record, traced ones close, the adapter is trained."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiny_model.py", str(OUTPUT)])
    runpy.run_path(str(ROOT / EXAMPLES / "tiny_model.py"), run_name="__main__")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "memtrace", "run", "--trace-every", "2", "trl", "sft", "--config"]
    command.append(str(EXAMPLES / "trl.yaml"))
    variables = {**os.environ, **NO_DEVICE, "PATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = Path(yaml.safe_load((ROOT / EXAMPLES / "trl.yaml").read_text())["output_dir"])
    found = checked(output / "memtrace" / "steps-rank0.jsonl", 4)
    assert found["traced"] >= 2
    base = (OUTPUT / "model" / "model.safetensors").stat().st_size
    assert found["categories"]["weights"] == pytest.approx(base, rel=0.02)  # and an adapter of one percent
    assert (output / "adapter_model.safetensors").is_file()
    assert "step 4 · rank 0 · cpu · traced" in done.stderr


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module with a base class in the place of axolotl's, which is not installed here."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "memtrace.adapters.axolotl", raising=False)
    import memtrace.adapters.axolotl

    yield memtrace.adapters.axolotl
    sys.modules.pop("memtrace.adapters.axolotl", None)


def test_the_section_of_axolotl_has_the_settings(axolotl: Any) -> None:
    """They reach the callback, None too; without a section it has the defaults."""
    plugin = axolotl.MemTracePlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    section = getattr(sys.modules[module], name)(memtrace={"port": None, "trace_every": 7})
    (callback,) = plugin.add_callbacks_post_trainer(SimpleNamespace(memtrace=section.memtrace), None)
    assert (callback._config.port, callback._config.trace_every) == (None, 7)
    (callback,) = plugin.add_callbacks_post_trainer(SimpleNamespace(memtrace=None), None)
    assert callback._config.trace_every is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace_evry": 7}, "unknown setting 'trace_evry': did you mean 'trace_every'"),
        ({"port": 99999}, "port must be 0..65535, got 99999"),
        ([1], "valid dictionary"),
    ],
)
def test_a_wrong_section_of_axolotl_is_refused(axolotl: Any, settings: object, message: str) -> None:
    """When axolotl reads its configuration, with the place and what is wrong."""
    with pytest.raises(ValidationError, match=rf"(?s)memtrace.*{message}"):
        axolotl.MemTraceSection(memtrace=settings)

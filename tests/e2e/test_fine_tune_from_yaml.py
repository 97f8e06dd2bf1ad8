"""A fine-tune from YAML by the framework's own command. TRL's is installed here; `make frameworks` runs the others."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from versions.frameworks import EXAMPLES, NO_DEVICE, OUTPUT, ROOT, checked

pytestmark = pytest.mark.long


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

"""Runs of real engines in processes of their own, shared by the tests of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"

Report = dict[str, Any]
Launch = Callable[..., list[Report]]


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that sees frees on other threads."""
    library = tmp_path_factory.mktemp("preloaded") / "foreign_frees.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, WORKERS / "foreign_frees.c"], check=True)
    return library


@pytest.fixture(scope="session")
def launch(preloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs a worker with torchrun; returns the report of each rank."""

    def run(worker: str, *, processes: int = 2, **environment: str) -> list[Report]:
        directory = tmp_path_factory.mktemp("report")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        finished = subprocess.run(
            [*launcher, WORKERS / worker],
            env={
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "HF_HUB_OFFLINE": "1",
                "KINETO_LOG_LEVEL": "6",
                "LD_PRELOAD": str(preloaded),
                "OMP_NUM_THREADS": "1",
                "REPORT_DIR": str(directory),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-8000:]
        return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(processes)]

    return run


@pytest.fixture(scope="session")
def torch_engines(launch: Launch) -> list[Report]:
    """The reports of DDP and FSDP2, trained one after the other in the same two processes."""
    variants = "ddp,ddp-view,fsdp1,fsdp1-bf16,fsdp1-bf16-keep,fsdp,fsdp-keep,fsdp-bf16,fsdp-bf16-keep,fsdp-bf16-offload"
    return launch("torch_engines.py", VARIANTS=f"{variants},fsdp-in-backward")

"""A repository with cases that need torch alone, and `memtrace check` run in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NETWORK = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, 64))


def batch():
    return torch.ones(16, 64)


def loss(model, batch):
    print("printed by the code of the case")
    return model(batch).square().mean()


def leaves():
    raise SystemExit(3)


def refuses():
    raise ValueError("no such width")
"""

CASES = """
[cases.{name}]
build = "network:{build}"
batch = "network:batch"
loss = "network:loss"
recipe = "fp32"
"""


def check(directory: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memtrace", "check", *options],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def write(directory: Path, *, width: int = 256, **builds: str) -> None:
    (directory / "network.py").write_text(NETWORK.replace("WIDTH", str(width)), encoding="utf-8")
    text = "".join(CASES.format(name=name, build=build) for name, build in builds.items())
    (directory / "memtrace.toml").write_text(text, encoding="utf-8")

"""`memtrace bisect` on packages and a repository made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from gate.versions.test_commits import git
from gate.versions.wheels import write_wheel

from memtrace.cli import main

NETWORK = """
import torch
from torch import nn

import layers

def build():
    return nn.Sequential(*(layers.Layer(64) for _ in range({count})))

def batch():
    return torch.randn(256, 64)

def loss(model, batch):
    return model(batch).sum()
"""
LAYERS = """
import torch
from torch import nn

class Layer(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width, bias=False, dtype=torch.float32)

    def forward(self, x):
        return super().forward(x){after}
"""
CASES = """
[cases.network]
build = "network:build"
batch = "network:batch"
loss = "network:loss"
recipe = "fp32"
optimizer = "sgd"
device = "cpu"
"""


def layers(after: str = "") -> str:
    return LAYERS.format(after=after)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    (root / "network.py").write_text(NETWORK.format(count=4))
    (root / "memtrace.toml").write_text(CASES)
    monkeypatch.chdir(root)
    return root


def test_the_release_that_changed_a_peak_is_found(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With category and module; a release that cannot be imported is skipped; what is known is not planned again."""
    wheels = tmp_path / "wheels"
    for version, code in {
        "1.9": layers(),
        "1.10": "raise RuntimeError('not with this Python')\n",
        "1.11": layers(),
        "1.12": layers(".sin()"),
        "2.0b1": layers(".sin().sin()"),
    }.items():
        write_wheel(wheels, "layers", version, code)
    source = ["--package", "layers", "--no-index", "--find-links", str(wheels), "--cache", str(tmp_path / "kept")]
    command = ["bisect", *source, "--good", "1.9", "--bad", "1.12"]

    assert main(command) == 0
    answer, progress = capsys.readouterr()
    assert "layers 1.12 changed the peak of network by +288.00 KiB: 416.01 KiB before, 704.01 KiB after" in answer
    assert re.search(r"activations float32 +1 +64\.00 KiB +128\.00 KiB +\+64\.00 KiB", answer), answer
    assert "several jumps" not in answer
    assert re.search(r"^1\.10 +skipped: .*RuntimeError: not with this Python$", progress, re.MULTILINE), progress

    shutil.rmtree(project / "__pycache__", ignore_errors=True)
    assert main([*command, "--json"]) == 0
    answer, progress = capsys.readouterr()
    document = json.loads(answer)
    assert document["schema"] == "memtrace.bisect/1"
    jump = document["jump"]
    assert (jump["before"], jump["after"], jump["bytes"]) == ("1.11", "1.12", 288 * 1024)
    assert list(document["tried"]) == ["1.9", "1.12", "1.10", "1.11"]
    assert progress.count("(kept from before)") == 4

    assert main([*command[:-1], "1.11"]) == 1
    answer = capsys.readouterr().out
    assert re.fullmatch(
        r"The peak of network is \d+\.\d\d KiB at both ends: there is no change to look for\.\n", answer
    )


@pytest.mark.long
def test_the_commit_that_changed_a_peak_is_found(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of the repository stay as they are, and what is not committed is not planned."""
    git(tmp_path, "init", "--quiet", str(project))
    (project / "layers.py").write_text(layers())
    for count, subject in ((4, "begin"), (4, "words"), (5, "a layer more")):
        (project / "network.py").write_text(f"# {subject}\n" + NETWORK.format(count=count))
        git(project, "add", ".")
        git(project, "commit", "--quiet", "--message", subject)
    (project / "network.py").write_text("raise RuntimeError('not committed')\n")
    before = git(project, "status", "--porcelain")

    assert main(["bisect", "--good", "HEAD~2", "--bad", "HEAD", "--cache", str(tmp_path / "kept")]) == 0
    answer = capsys.readouterr().out
    assert re.search(r"^\w+ a layer more changed the peak of network by \+80\.00 KiB", answer), answer
    assert re.search(r"weights trainable float32 +4 +0 B +16\.00 KiB +\+16\.00 KiB", answer), answer
    assert git(project, "status", "--porcelain") == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--case", "another"], "has no case 'another', only network"),
        (["--seq-len", "8"], "--seq-len is for a case given here"),
        (["--config", "c.json", "--case", "network"], "leave them or --config and --build out"),
        (["--with", "peft"], "--with is for releases of a package"),
        ([], "is in no git repository"),
    ],
)
def test_a_mistake_is_told(project: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "--good", "1", "--bad", "2", *options]) == 2
    assert said in capsys.readouterr().err


def test_what_releases_of_torch_take_is_said_before_one_is_downloaded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many at most, where, and where builds without CUDA are; one that cannot be installed is a reason."""
    wheels = tmp_path / "wheels"
    for version in ("90.0", "90.1", "90.2"):
        write_wheel(wheels, "torch", version, "", ["no-package-of-this-name"])
    monkeypatch.setattr("sys.platform", "linux")
    source = ["--no-index", "--find-links", str(wheels), "--cache", str(tmp_path / "kept" / "here")]
    assert main(["bisect", "--package", "torch", "--good", "90.0", "--bad", "90.2", *source]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"3 releases of torch, from 90.0 to 90.2\nUp to 3 of them are installed in {tmp_path}/kept/here"
    )
    assert "No plan needs CUDA: --extra-index-url https://download.pytorch.org/whl/cpu has builds of 1 GB." in said
    assert re.search(r"memtrace: 90\.0 cannot be planned, .*: pip install: Cannot install torch==90\.0 because", said)
    assert main(["bisect", "--package", "torch", "--good", "89.9", "--bad", "90.2", *source]) == 2
    assert "torch has no release 89.9 here: there are, among others, 90.0, 90.1, 90.2" in capsys.readouterr().err
    source[-1] = str(tmp_path / ("no name of a directory is as long" * 9))
    assert main(["bisect", "--package", "torch", "--good", "90.0", "--bad", "90.2", *source]) == 2
    said = capsys.readouterr().err
    assert re.search(r"memtrace: releases cannot be kept in .* name another with --cache", said)

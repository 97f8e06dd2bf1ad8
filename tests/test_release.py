"""What a release uploads, as its users have it: built, installed beside a torch that is there, run as README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import memtrace

ROOT = Path(__file__).parents[1]
PYTHONS = {"3.11", "3.12"}
"""The versions of Python that memtrace was run with: see docs/versions.md, and tests/fixtures/gpu for the second."""
BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("MEMTRACE_")}
TOOLS = os.environ.get("PYTHONPATH", "")
PACKAGES = Path(sysconfig.get_path("purelib"))

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def run(*command: object, **environment: str) -> str:
    """Returns what a command writes to stdout; it must succeed."""
    done = subprocess.run([*map(str, command)], env=BARE | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The source archive and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT, PYTHONPATH=TOOLS)
    archive, wheel = sorted(directory.iterdir(), key=lambda path: path.suffix)
    return [archive, wheel]


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_what_is_built_can_be_uploaded(built: list[Path]) -> None:
    """twine finds nothing to say; version, licence, address and the Pythons that were run are in the metadata."""
    run(sys.executable, "-m", "twine", "check", "--strict", *built, PYTHONPATH=TOOLS)
    archive, wheel = built
    metadata = metadata_of(wheel)
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert metadata["Version"] == memtrace.__version__ == newest[1]
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata.get_all("Project-URL")
    prefix = "Programming Language :: Python :: "
    classifiers = [found.removeprefix(prefix) for found in metadata.get_all("Classifier", []) if found[:-4] == prefix]
    assert set(classifiers) == PYTHONS
    with zipfile.ZipFile(wheel) as packed:
        names = {name.partition("/")[0] for name in packed.namelist()}
        assert names == {"memtrace", f"torch_memtrace-{memtrace.__version__}.dist-info"}
        assert "memtrace/py.typed" in packed.namelist()
    with tarfile.open(archive) as sources:
        assert {Path(name).parts[1] for name in sources.getnames()} <= {
            ".gitignore",
            "CHANGELOG.md",
            "LICENSE",
            "PKG-INFO",
            "README.md",
            "pyproject.toml",
            "src",
        }


def environment(directory: Path, installed: Path) -> Path:
    """Returns the interpreter of an empty environment that finds the packages of another directory, too."""
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    (site,) = (directory / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text(f"{installed}\n")
    return directory / "bin" / "python"


def pip_install(python: Path, *arguments: object) -> str:
    """Returns what pip says; it asks no index."""
    return run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", *arguments)


@pytest.mark.parametrize("torch", ["2.6.0", "2.11.0a0", "2.11.0a0+abc.nv25.9"])
def test_the_torch_that_is_there_stays(built: list[Path], torch: str, tmp_path: Path) -> None:
    """With the extra that README names, pip would install memtrace and nothing else."""
    installed = tmp_path / "installed"
    installed.mkdir()
    for path in PACKAGES.glob("*.dist-info"):
        if not re.match(r"torch(_memtrace)?-", path.name):
            (installed / path.name).symlink_to(path)
    known = installed / f"torch-{torch}.dist-info"
    known.mkdir()
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    python = environment(tmp_path / "environment", installed)
    report = json.loads(pip_install(python, "--dry-run", "--report", "-", f"{built[1]}[transformers]"))
    assert [found["metadata"]["name"] for found in report["install"]] == ["torch-memtrace"]


@pytest.fixture(scope="module")
def installed(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, beside all that this one has but memtrace; returns its programs' directory."""
    directory = tmp_path_factory.mktemp("installed")
    beside = directory / "beside"
    beside.mkdir()
    for path in PACKAGES.iterdir():
        if not re.match(r"_*(editable|torch_memtrace|memtrace)", path.name):
            (beside / path.name).symlink_to(path)
    python = environment(directory / "environment", beside)
    pip_install(python, built[1])
    return python.parent


BEFORE = """
import sys, torch, transformers
from functools import partial
import memtrace
assert memtrace.__file__.startswith({prefix!r}), memtrace.__file__
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

def make():
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    return BertForSequenceClassification(BertConfig(**shape))

def train(model, optimizer):
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

rows = [dict(input_ids=torch.arange(8), labels=torch.tensor(at % 2)) for at in range(8)]
batch = {{name: torch.stack([row[name] for row in rows]) for name in rows[0]}}

def Trainer(_, **given):
    arguments = TrainingArguments("trained", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
    return transformers.Trainer(make(), arguments, train_dataset=rows, **given)

model = make()
optimizer = torch.optim.AdamW(model.parameters())
print("--- begins", file=sys.stderr)
"""
AFTER = ("trainer.train()", "train(model, optimizer); optimizer.close()", "")
"""What a reader's script does after each of README's three blocks."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_the_three_ways_of_the_readme(installed: Path, tmp_path: Path) -> None:
    """Each block runs as it is written; says where metrics and log are, shows its table, and leaves the log there."""
    ways = blocks("python")
    assert len(ways) == len(AFTER)
    script = tmp_path / "finetune.py"
    ended = [f"{way}\n{after}" for way, after in zip(ways, AFTER, strict=True)]
    script.write_text("\n".join([BEFORE.format(prefix=str(installed.parent)), *ended]))
    done = subprocess.run(
        [installed / "python", script], cwd=tmp_path, env=BARE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.partition("--- begins\n")[2]
    at = re.findall(r"^memtrace: metrics at http://127\.0\.0\.1:\d+/metrics, step log (\S+)$", said, re.MULTILINE)
    assert at == ["trained/memtrace/steps-rank0.jsonl", *["memtrace-runs/finetune/steps-rank0.jsonl"] * 2]
    assert all((tmp_path / log).stat().st_size for log in at)
    assert len(re.findall(r"^step \d+ · rank 0 · cpu · traced", said, re.MULTILINE)) == 3
    assert int(done.stdout.splitlines()[-1]) > 0  # bytes of the optimizer's state


STATUS = {"memtrace plan --params 8e9": 2}
"""Exit status of commands that do not end with 0, by how they begin: that plan does not fit its device."""
SHOWN = {
    "memtrace watch": "Llama-3-8B|optimizer_state",
    "memtrace show": "optimizer_state",
    "memtrace report": "report.html",
    "memtrace plan --params 8e9": r"132\.8",
    "memtrace plan --config": "",
    "memtrace compare": "measured",
}
"""What each command's output has in it."""


@pytest.mark.long
def test_the_commands_of_the_readme(installed: Path, tmp_path: Path) -> None:
    """Each runs as it is written, one after the other in one directory; `watch` looks once."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "memtrace").symlink_to(ROOT / "tests" / "fixtures" / "gpu" / "llama-3-8b")
    (tmp_path / "Llama-3-8B").mkdir()
    (tmp_path / "Llama-3-8B" / "config.json").write_text(json.dumps(LLAMA))
    commands = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    run_elsewhere = ["make demo", "make test", "pip install"]
    assert [begin for begin in run_elsewhere if not any(command.startswith(begin) for command in commands)] == []
    seen = []
    for command in commands:
        if command.startswith(tuple(run_elsewhere)):
            continue
        (begin,) = (begin for begin in SHOWN if command.startswith(begin))
        once = command.replace("watch ", "watch --once ")
        done = subprocess.run(
            ["bash", "-c", once],
            cwd=tmp_path,
            env=BARE | {"PATH": f"{installed}{os.pathsep}{BARE['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == STATUS.get(begin, 0), done.stderr
        assert re.search(SHOWN[begin], done.stdout), done.stdout
        seen.append(begin)
    assert seen == [*SHOWN]
    assert (tmp_path / "report.html").exists()

"""The same bytes again and again, and the whole gate on code that uses transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checked_repository import check

REPOSITORY = Path(__file__).parent / "repository"

REPEATED = """
import json, sys
from pathlib import Path
from memtrace.gate.baseline import Baseline, baseline_text
from memtrace.gate.case_file import read_case_file
from memtrace.gate.case_plan import plan_case

file = read_case_file(Path("memtrace.toml"))
names = sorted(file.cases, reverse=sys.argv[1] == "backwards")
texts = set()
for at in range(10):
    order = names[at % len(names):] + names[: at % len(names)]
    cases = {name: plan_case(file.cases[name], file.root, file.python_path) for name in order}
    texts.add(baseline_text(Baseline(versions={}, cases=cases)))
print(json.dumps(sorted(texts)))
"""

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 256,
}

CASES = """
[cases.adapters]
config = "llama.json"
seq_len = 64
batch_size = 2
recipe = "lora"
gradient_checkpointing = true

[cases.shards]
config = "llama.json"
seq_len = 64
sharding = "zero3"
world_size = 4
device = "H100-80GB"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The repository of the tests, with two cases more."""
    directory = tmp_path / "repository"
    shutil.copytree(REPOSITORY, directory)
    (directory / "llama.json").write_text(json.dumps(LLAMA))
    with (directory / "memtrace.toml").open("a", encoding="utf-8") as file:
        file.write(CASES)
    return directory


@pytest.mark.long
def test_twenty_repetitions_are_one_text(repository: Path) -> None:
    """Ten in each of two processes, in every order, with other seeds of hashes and other numbers of threads."""
    texts: list[str] = []
    for order, seed, threads in (("forwards", "0", "1"), ("backwards", "4242", "2")):
        ended = subprocess.run(
            [sys.executable, "-c", REPEATED, order],
            cwd=repository,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        texts += json.loads(ended.stdout)
    assert len(texts) == 2 and len(set(texts)) == 1
    ended = check(repository, "--json")
    assert json.loads(ended.stdout)["cases"] == json.loads(texts[0])["cases"]


@pytest.mark.long
def test_the_command_finds_the_case_that_a_change_is_in(repository: Path) -> None:
    """A layer more in the code of one case: the other cases are silent."""
    assert check(repository, "--update").returncode == 0
    code = (repository / "network.py").read_text(encoding="utf-8")
    (repository / "network.py").write_text(code.replace("LAYERS = 2", "LAYERS = 3"), encoding="utf-8")
    ended = check(repository)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("adapters is unchanged: ") and lines[-2].startswith("shards is unchanged: ")
    assert lines[1].startswith("language-model grew: peak ")
    assert "    weights trainable bfloat16 of body.layers.*.mlp.gate_proj: +16.00 KiB, 32.00 KiB before" in lines

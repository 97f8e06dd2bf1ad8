"""Every block of the documentation runs as written and shows what the page says, or is named here with a reason.

README.md has a test of its own.
"""

from __future__ import annotations

import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import ROOT, Block, blocks_of, difference, run_command

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "integrations" / "README.md", ROOT / "examples" / "README.md"])
PAGES = [page for page in PAGES if page.exists()]

NOT_RUN = {
    "pip install": "installs from a registry; continuous integration installs the wheel that it has built",
    "curl -s http://127.0.0.1:16368/metrics": "asks a run that goes on, at the default port, which another may have",
    "MEMTRACE_LINGER_SECONDS=30 python finetune.py": "the script of the reader",
    "git clone": "needs the address of the repository",
    "memtrace bisect ": "installs releases from a registry; tests/cli/test_bisect.py has packages of its own",
    "make ": "set up an environment of their own; continuous integration runs them",
    "docker compose": "needs Docker and images from a registry; tests/integrations checks the file",
    "memtrace run --trace-every 50 llamafactory-cli": "`make frameworks` runs it, in an environment of its own",
    "kubectl apply": "needs a cluster; tests/integrations checks the manifests against their schemas",
}
"""Commands that are not run, by how they begin."""

ELSEWHERE = {
    "memtrace run ": "tests/run/test_unchanged_scripts.py",
    "torchrun --nproc-per-node 8 -m memtrace": "tests/run/test_unchanged_scripts.py",
    "accelerate launch": "tests/run/test_unchanged_scripts.py",
    "deepspeed ": "tests/run/test_unchanged_scripts.py",
    "promtool ": "tests/integrations/test_rules.py",
    "amtool ": "tests/integrations/test_deploy.py",
    "memtrace run --trace-every 50 trl sft": "tests/e2e/test_fine_tune_from_yaml.py",
    "python prometheus/build_runbook.py": "tests/integrations/test_deploy.py",
    "python grafana/build_dashboards.py": "tests/integrations/test_dashboards.py",
    "python kubernetes/build_manifests.py": "tests/integrations/test_deploy.py",
}
"""Commands that write over files of the repository, need servers or a reader's files, and the test that runs them."""

NO_CODE = {
    ("docs/how-it-works.md", "events   what the allocator did:"): "a drawing",
    ("docs/risk.md", "memtrace_oom_risk_ratio = max("): "a formula",
}
"""Indented blocks that are no commands, by page and beginning."""

LANGUAGES = {"console", "python", "yaml", "promql", "mermaid", "toml", "text"}
"""What a fence may hold: commands, Python and settings, which are run and read here, memtrace.toml,
expressions, which tests/integrations/test_rules.py reads, the picture that tests/test_development.py makes anew, and an
output that tests/test_regressions.py compares."""

STATUS = {
    "memtrace plan --params 8e9 --activation-ratio 0.3 --device H100-80GB --what-if": 2,
    "memtrace plan --config ./Llama-3-8B --seq-len 2048 --recipe bf16-master --device H100-80GB --what-if "
    "--by-module": 2,
    "memtrace check --format text --format junit=report.xml": 1,
    "python examples/finetune_trainer.py --output-dir small --max-steps 3 \\\n"
    "    --max-tokens 128 --held-out 100 --memory-limit 700MiB": 1,
}
"""Exit status of commands that do not end with 0: out of memory, and plans that do not fit."""

LONG = {
    "docs/check.md": "plans Llama-3-8B four times, in processes of its own",
    "docs/examples.md": "trains four times, each in processes of its own",
    "docs/out-of-memory.md": "trains twice in processes of its own, since one has a limit of memory",
    "docs/plan.md": "simulates Llama-3-8B several times, for what would save memory",
}

LLAMA = """{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
"max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
"torch_dtype": "bfloat16"}"""


def reason(table: dict[str, str], command: str) -> str | None:
    return next((why for begin, why in table.items() if command.startswith(begin)), None)


def is_command(block: Block) -> bool:
    return block.language == "console" or (not block.language and not no_code(block))


def no_code(block: Block) -> bool:
    return any(block.page == page and block.text.startswith(begin) for page, begin in NO_CODE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as a reader has it: the repository's examples, a run, a configuration."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(ROOT / "tests" / "fixtures" / "gpu" / "llama-3-8b", tmp_path / "out" / "memtrace")
    shutil.copytree(ROOT / "tests" / "fixtures" / "allocator_recordings", tmp_path / "second-step")
    shutil.copytree(ROOT / "tests" / "fixtures" / "snapshots", tmp_path / "failed")
    (tmp_path / "Llama-3-8B").mkdir()
    (tmp_path / "Llama-3-8B" / "config.json").write_text(LLAMA)
    return tmp_path


@pytest.fixture
def a_script(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a reader's script has before the block."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    monkeypatch.chdir(directory)
    monkeypatch.setenv("MEMTRACE_PORT", "0")
    arguments = TrainingArguments(output_dir="out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    model = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.tensor(at % 2)} for at in range(8)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"model": model, "optimizer": optimizer, "arguments": arguments, "dataset": rows, "batches": [batch] * 3}
    return {"__name__": "__main__", "torch": torch, "Trainer": Trainer, **names}


def marked(pages: list[Path]) -> list[Any]:
    names = [page.relative_to(ROOT).as_posix() for page in pages]
    return [pytest.param(name, marks=[pytest.mark.long] if name in LONG else [], id=name) for name in names]


@pytest.mark.parametrize("page", marked([p for p in PAGES if any(is_command(block) for block in blocks_of(p))]))
def test_commands_run_and_show_what_the_page_says(page: str, directory: Path) -> None:
    """One after the other, in one directory; each ends as it should."""
    for block in blocks_of(ROOT / page):
        if block.language == "toml":
            (directory / "memtrace.toml").write_text(block.text)
        if not is_command(block):
            continue
        for command, said in block.commands:
            if reason(NOT_RUN, command) or reason(ELSEWHERE, command):
                assert not said, f"{page}:{block.line} shows an output that nothing compares"
                continue
            status, shown = run_command(command, directory)
            assert status == STATUS.get(command, 0), f"{page}:{block.line}: {command}\n{shown}"
            wrong = difference(said, shown) if said else None
            assert wrong is None, f"{page}:{block.line}: {command}\n{wrong}"


@pytest.mark.parametrize(
    "page",
    [p.relative_to(ROOT).as_posix() for p in PAGES if any(block.language == "python" for block in blocks_of(p))],
)
def test_python_runs(page: str, a_script: dict[str, Any]) -> None:
    """The blocks of a page are one script; each that prints prints something."""
    for block in blocks_of(ROOT / page):
        if block.language == "python":
            lines = "\n" * block.line + block.text
            with redirect_stdout(StringIO()) as printed:
                exec(compile(lines, str(ROOT / page), "exec"), a_script)
            assert printed.getvalue().strip() or "print(" not in block.text


def test_yaml_is_read_and_names_what_exists() -> None:
    """Each is a document; the thresholds in it are those of the shipped rules."""
    documents = [yaml.safe_load(block.text) for page in PAGES for block in blocks_of(page) if block.language == "yaml"]
    assert documents
    rules = (ROOT / "integrations" / "prometheus" / "memtrace.rules.yml").read_text()
    named = [rule["record"] for document in documents if isinstance(document, list) for rule in document]
    assert [name for name in named if f"record: {name}" not in rules] == []


def test_every_block_is_run_or_named() -> None:
    """A fence has a language that is known, an indented block is a command or declared, and no declaration is idle."""
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert {block.language for block in blocks} <= {*LANGUAGES, ""}
    known = ("memtrace ", *NOT_RUN, *ELSEWHERE)
    for block in blocks:
        if not block.language and not no_code(block):
            for command, _ in block.commands:
                assert command.startswith(known), f"{block.page}:{block.line}: {command!r} is neither run nor named"
    commands = [command for block in blocks if is_command(block) for command, _ in block.commands]
    for begin in (*NOT_RUN, *ELSEWHERE, *STATUS):
        assert any(command.startswith(begin) for command in commands), begin
    for page, begin in NO_CODE:
        assert any(block.page == page and block.text.startswith(begin) for block in blocks), (page, begin)
    assert set(LONG) <= {block.page for block in blocks}
    for test in ELSEWHERE.values():
        assert (ROOT / test).exists()


@pytest.mark.parametrize(
    ("said", "shown", "same"),
    [
        ("total 405.03", "total   404.9", True),
        ("total 405.03", "total 505.03", False),
        ("total 405.03", "sum 405.03", False),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("a\n...\nz", "a\nb", False),
        ("a", "a\nb", False),
        ("a\n...", "a\nb", True),
        ("took 3 ms", "took 412.8 ms", True),
        ("report oom-20261128T081451.828Z.md", "report oom-20270101T000000.000Z.md", True),
        ("allocate ... bytes", "allocate 12582912 bytes", True),
        ("allocate ... bytes of 5", "allocate 12582912 bytes of", False),
        ("", "a", False),
    ],
)
def test_outputs_are_compared(said: str, shown: str, same: bool) -> None:
    """Words and their order have to be the same, numbers within a tenth; the rest is said in `documented`."""
    assert (difference(said, shown) is None) == same

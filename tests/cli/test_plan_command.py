"""`memtrace plan` from the command line: the starting document's table, the verdict as exit status, every format."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from memtrace.cli import main
from memtrace.cli.plan.options import parse_count
from memtrace.errors import PlanError
from memtrace.planning.optimizers.states import OPTIMIZERS
from memtrace.planning.recipe import RECIPES
from memtrace.record.plan import read_plan

START = ["plan", "--params", "8e9", "--recipe", "bf16-master", "--optimizer", "adamw", "--activation-ratio", "0.3"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and messages of `memtrace plan` with these arguments besides."""
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(table: str) -> dict[str, list[str]]:
    """The figures of each row of the table, by what stands before them."""
    found = {}
    for line in table.splitlines():
        cells = line.strip("■ ").split("  ")
        figures = [cell for cell in (part.strip() for part in cells) if cell and cell[0].isdigit()]
        if len(figures) >= 3:
            found[" ".join(cells[0:2]).strip()] = figures[:3]
    return found


def test_the_starting_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Its table to the digit, GB and GiB side by side."""
    assert main(START) == 0
    assert rows(capsys.readouterr().out) == {
        "weights trainable bfloat16": ["16.0", "14.9", "12.0%"],
        "master_weights float32": ["32.0", "29.8", "24.1%"],
        "gradients bfloat16": ["16.0", "14.9", "12.0%"],
        "optimizer_state exp_avg float32": ["32.0", "29.8", "24.1%"],
        "optimizer_state exp_avg_sq float32": ["32.0", "29.8", "24.1%"],
        "activations bfloat16": ["4.8", "4.5", "3.6%"],
        "total": ["132.8", "123.7", "100.0%"],
    }


def test_formula_mode_does_not_load_torch() -> None:
    """A plan by formula is there before torch would be."""
    code = (
        "import sys; from memtrace.cli import main; "
        f"main({START!r}); sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("device", "status", "said"),
    [
        (["--device", "H200", "--optimizer", "sgd"], 0, "fits"),
        (["--capacity", "140GiB"], 1, "uncertain"),
        (["--device", "H100-80GB"], 2, "does not fit"),
        (["--capacity", "1TiB"], 0, "fits"),
        ([], 0, ""),
    ],
)
def test_the_exit_status_is_the_verdict(
    device: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 fits or was not asked, 1 uncertain, 2 does not fit; the line of the device says it with the headroom."""
    assert main([*START, *device]) == status
    output = " ".join(capsys.readouterr().out.split())  # whatever the width of the terminal
    assert said in output
    assert ("GiB to spare" in output or "GiB short" in output) == bool(device)


def test_json_is_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints a memtrace.plan/1 that the package reads back."""
    status, output, _ = run(capsys, "--params", "1B", "--zero", "2", "--world-size", "8", "--json", "--device", "T4")
    path = tmp_path / "plan.json"
    path.write_text(output)
    assert status == 1
    assert read_plan(path).fit is not None
    document = json.loads(output)
    assert document["schema"] == "memtrace.plan/1"
    assert document["verdict"] == "uncertain"
    assert document["setup"]["strategy"] == "zero2"


def test_markdown_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """A table that renders on GitHub, with the total in bold."""
    assert main([*START, "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| activations | bfloat16 | 4.8 | 4.5 | 3.6% |" in lines
    assert "| **total** |  | **132.8** | **123.7** | **100.0%** |" in lines


def test_deepspeed_constants(capsys: pytest.CaptureFixture[str]) -> None:
    """`--constants deepspeed` prints DeepSpeed's estimate, host memory and all."""
    status, output, _ = run(
        capsys,
        *("--params", "2851M", "--largest-layer-params", "32M", "--zero", "3", "--world-size", "16", "--nodes", "2"),
        *("--constants", "deepspeed", "--json"),
    )
    document = json.loads(output)
    assert status == 0
    assert (document["total_bytes"], document["host_bytes"]) == (3_335_375_000, 1_536_000_000)


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_what_if(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Remedies are listed with what they save and whether it fits then, in every format."""
    assert main([*START, "--what-if", "--device", "H100", "--format", form]) == 2
    output = capsys.readouterr().out
    if form == "json":
        (zero,) = [remedy for remedy in json.loads(output)["remedies"] if remedy["name"] == "ZeRO 2 over 8 GPUs"]
        assert zero == {
            "name": "ZeRO 2 over 8 GPUs",
            "total_bytes": 35_800_000_000,
            "saved_bytes": 97_000_000_000,
            "world_size": 8,
            "verdict": "fits",
        }
    else:
        (line,) = [line for line in output.splitlines() if "ZeRO 2 over 8 GPUs" in line]
        assert "97.00 GB" in line and "35.80 GB" in line and "fits" in line


def test_nothing_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no remedy helps the table says so."""
    _, output, _ = run(capsys, "--params", "1", "--recipe", "qlora", "--optimizer", "none", "--what-if")
    assert "No remedy saves anything" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --params"),
        (["--params", "many"], "a count must be a whole number such as 8e9, 8B or 350M, got 'many'"),
        (["--params", "1.5"], "whole number"),
        (["--params", "1e999"], "whole number"),
        (["--params", "8B", "--recipe", "bf16"], "unknown recipe 'bf16'"),
        (["--params", "8B", "--optimizer", "adamx"], "unknown optimizer 'adamx': did you mean"),
        (["--params", "8B", "--world-size", "8"], "DDP, FSDP or a ZeRO stage"),
        (["--params", "8B", "--device", "H100", "--world-size", "2"], "DDP, FSDP or a ZeRO stage"),
        (["--params", "8B", "--device", "GTX"], "unknown device 'GTX'"),
        (["--params", "8B", "--capacity", "much"], "a size must be a number and a unit"),
        (["--params", "8B", "--activation-bytes", "few"], "a size must be a number and a unit"),
        (["--params", "8B", "--activation-ratio", "nan"], "activation ratio must be"),
        (["--params", "8B", "--constants", "deepspeed", "--what-if"], "leave --constants deepspeed out"),
        (["--params", "8B", "--constants", "deepspeed"], "ZeRO 2 and 3 only"),
    ],
)
def test_mistakes_are_named(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake is one line that names the option's value and what was expected, and status 2."""
    status, output, message = run(capsys, *arguments)
    assert (status, output) == (2, "")
    assert message.startswith("memtrace: ") and said in message


@pytest.mark.parametrize(
    ("text", "count"),
    [("8e9", 8 * 10**9), ("7.5B", 7_500_000_000), ("350m", 350 * 10**6), (" 12 ", 12), ("1T", 10**12)],
)
def test_counts(text: str, count: int) -> None:
    """Counts are written with an exponent, with a letter, or in full."""
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-1", "8 GB", "1e", "0x10", "1_000", "inf", "nan", "\u0663"])
def test_what_is_no_count(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(PlanError):
        parse_count(text)


VALUES = {
    "--params": ["8e9", "1", "0", "-5", "7B", "1e15", "1e16", "x", ""],
    "--trainable-params": ["0", "1e6", "8e9", "9e9", "?"],
    "--activation-ratio": ["0", "0.3", "-1", "nan", "inf", "1e9", "x"],
    "--activation-bytes": ["0", "4GiB", "9999TiB", "many"],
    "--layers": ["1", "80", "0", "-3", "x"],
    "--largest-layer-params": ["1", "5e8", "1e12"],
    "--recipe": [*RECIPES, "bf16", ""],
    "--optimizer": [*OPTIMIZERS, "adm", ""],
    "--accumulation-steps": ["1", "4", "0"],
    "--zero": ["0", "1", "2", "3", "4"],
    "--fsdp": [],
    "--ddp": [],
    "--world-size": ["1", "8", "1000", "0", "-1", "1e9"],
    "--nodes": ["1", "2", "0", "3"],
    "--offload": ["optimizer", "parameters", "disk"],
    "--overlap-comm": [],
    "--gradient-as-bucket-view": [],
    "--device": ["H100", "A100", "L4", "local", ""],
    "--capacity": ["24GiB", "0", "x"],
    "--constants": ["memtrace", "deepspeed"],
    "--what-if": [],
    "--format": ["table", "markdown", "json", "xml"],
}


def random_arguments(dice: random.Random) -> list[str]:
    """A few options with values that may be wrong, most often with a parameter count."""
    names = dice.sample(list(VALUES), dice.randrange(0, 8))
    arguments = ["--params", "8e9"] if dice.random() < 0.8 else []
    for name in names:
        arguments += [name, dice.choice(VALUES[name])] if VALUES[name] else [name]
    return arguments


@pytest.mark.parametrize("seed", range(4))
def test_random_arguments(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """1,200 random argument lists: a plan, or a message; never another exception."""
    dice = random.Random(seed)
    planned = 0
    for _ in range(300):
        arguments = random_arguments(dice)
        try:
            status = main(["plan", *arguments])
        except SystemExit as ended:  # argparse
            status = int(str(ended.code))
        output, message = capsys.readouterr()
        assert status in (0, 1, 2), arguments
        assert bool(output) != bool(message), arguments
        planned += bool(output)
    assert planned > 30

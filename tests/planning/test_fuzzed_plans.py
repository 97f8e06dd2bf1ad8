"""Whatever the configuration and the arguments: a plan, or one line that says what is wrong; soon, and nothing else."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from planning.fuzzed_plans import BASES, arguments_of

from memtrace.cli import main

_CHUNK = 250
_MOST_SECONDS = 300
"""Of the processor: several times what the dearest case, 300 layers of T5, takes on a slow machine."""


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns `plan` or `refused`, and checks that it is one of them in time.

    Time is that of the processor in this process: what else the machine does is not counted.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        status = main(["plan", *arguments])
    except SystemExit as ended:  # argparse
        status = ended.code
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    output, error = capsys.readouterr()
    assert status in (0, 1, 2), arguments
    assert seconds <= _MOST_SECONDS, arguments
    if output:
        assert not error, arguments
        return "plan"
    assert status == 2, arguments
    assert error.startswith(("memtrace: ", "usage: ")), (arguments, error)
    assert "Traceback" not in error, arguments
    return "refused"


def run(seeds: range, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the cases of these seeds; at least a fifth must be plans, and a fifth refused."""
    outcomes = []
    for seed in seeds:
        try:
            outcomes.append(outcome(arguments_of(seed, directory), capsys))
        except Exception as error:
            error.add_note(f"seed {seed}: {arguments_of(seed, directory)} {(directory / 'config.json').read_text()}")
            raise
    for kind in ("plan", "refused"):
        assert outcomes.count(kind) >= len(outcomes) / 5, {name: outcomes.count(name) for name in set(outcomes)}


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["model_type"])
def test_bases_can_be_planned(base: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is mutated below is right as it is, so that its refusals come from the mutations."""
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert outcome(["--config", str(tmp_path), "--seq-len", "12", "--json"], capsys) == "plan"


def test_some_random_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of the cases below."""
    run(range(60), tmp_path, capsys)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunk", range(1, 9))
def test_two_thousand_random_plans(chunk: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,000 cases, in eight parts."""
    run(range(chunk * _CHUNK, (chunk + 1) * _CHUNK), tmp_path, capsys)

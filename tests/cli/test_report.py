"""`memtrace report`."""

import shutil
from pathlib import Path

import pytest

from memtrace.cli import main

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The log directory of a run of two ranks under Trainer, with an out-of-memory report."""
    directory = tmp_path / "my-run" / "memtrace"
    directory.mkdir(parents=True)
    for rank, name in enumerate(("llama-fp32-adamw", "bert-lora")):
        text = (RUNS / f"{name}.jsonl").read_text()
        (directory / f"steps-rank{rank}.jsonl").write_text(text.replace('"rank":0', f'"rank":{rank},"run_id":"1"'))
    (directory / "oom-rank1-20260101T000000.000Z.md").write_text("# Out of memory: 3 GiB were asked for")
    return directory


def test_report_is_written(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has the name of the run, both ranks and the report of the failure; its path is printed."""
    output = tmp_path / "out.html"
    assert main(["report", str(run_dir), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    page = output.read_text()
    assert "<h1>my-run</h1>" in page
    assert "2 ranks" in page
    assert "3 GiB were asked for" in page


def test_limit_is_what_the_risk_is_measured_against(run_dir: Path, tmp_path: Path) -> None:
    """With a limit that the run exceeds, the report says so first."""
    output = tmp_path / "out.html"
    assert main(["report", str(run_dir), "-o", str(output), "--limit", "400MiB"]) == 0
    assert "risk 100%" in output.read_text()


def test_largest_batch_that_may_come_is_foreseen(tmp_path: Path) -> None:
    """A run that is safe as it goes is at risk where it may yet meet a larger batch, and the forecast says which."""
    log, output = tmp_path / "steps-rank0.jsonl", tmp_path / "out.html"
    shutil.copy(RUNS / "llama-dynamic-batch-size.jsonl", log)
    command = ["report", str(log), "-o", str(output), "--limit", "1840MiB"]
    assert main(command) == 0
    assert "The largest batch seen so far" in output.read_text()
    assert "risk 100%" not in output.read_text()
    assert main([*command, "--max-tokens", "2000"]) == 0
    assert "A micro batch of 2000 tokens" in output.read_text()
    assert "risk 100%" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/directory"], "there is no such step log"),
        (["{run}", "--limit", "much"], "a size must be a number and a unit"),
        (["{run}", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["{run}", "-o", "{run}"], "cannot be written"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user got wrong is one line and exit status 2."""
    assert main(["report", *(argument.format(run=run_dir) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_single_log_will_do(tmp_path: Path) -> None:
    """The path of one rank's log is a run of one rank."""
    log = tmp_path / "steps-rank0.jsonl"
    shutil.copy(RUNS / "t5-sgd-momentum.jsonl", log)
    assert main(["report", str(log), "-o", str(tmp_path / "out.html")]) == 0
    assert "1 rank " in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(("steps", "pictures"), [(1, 2), (2, 5)])
def test_a_run_with_one_traced_step_has_no_empty_pictures(steps: int, pictures: int, tmp_path: Path) -> None:
    """A line needs two points: of a single step the page shows its moments, and its tokens beside its peak."""
    records = [log for log in (RUNS / "t5-sgd-momentum.jsonl").read_text().splitlines() if '"peak"' in log]
    (tmp_path / "steps-rank0.jsonl").write_text("".join(f"{record}\n" for record in records[:steps]))
    page = tmp_path / "out.html"
    assert main(["report", str(tmp_path), "-o", str(page)]) == 0
    figures = page.read_text().split("<h2>")[1:]
    assert sum("Plotly.newPlot" in figure for figure in figures) == pictures
    assert ("Forecast" in page.read_text()) == (steps > 1)

"""Llama-3-8B on an H200, as it was recorded: see tests/fixtures/gpu/README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import page

from memtrace.cli import main
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.table import TABLE_WIDTH, render_text
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment, Phase
from memtrace.record.schema import StepEncoder, parse_step
from memtrace.record.strict_json import parse_json
from memtrace.sources.cuda.cublas import configured_sizes

GPU = Path(__file__).parents[1] / "fixtures" / "gpu"
RUN = GPU / "llama-3-8b"
LOG = RUN / "steps-rank0.jsonl"
FACTS: Mapping[str, Any] = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))
BREAKDOWNS: Mapping[str, Any] = json.loads((GPU / "breakdowns.json").read_text(encoding="utf-8"))
ANOTHER_NETWORK = "two_gpu_tensors_outside"
REPLAYED = "compiled_reduce_overhead"


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    return list(read_step_log(LOG))


def test_every_line_of_the_log_is_read_and_written_back(records: list[StepRecord]) -> None:
    """The step log of a real device keeps the schema: each record comes back equal after one more round."""
    assert len(records) == len(FACTS["step_s"])
    encoder = StepEncoder()
    for record in records:
        assert parse_step(parse_json(encoder.encode(record), "again"), "again") == record


def test_a_line_comes_in_parts_of_less_than_a_kilobyte(records: list[StepRecord]) -> None:
    """The C library answers a request for more by tidying up all that the training has let go of."""
    encoder = StepEncoder()
    counted = [encoder.parts(record) for record in records if not record.traced]
    assert counted
    assert max(len(part) for parts in counted for part in parts) < 1024
    assert max(map(len, counted)) <= 6


def test_the_peak_is_that_of_the_starting_document(records: list[StepRecord]) -> None:
    """16 + 32 + 16 + 32 + 32 + 4.8 = 132.8 GB by its table; torch counted 132.82 GB, the sum of the categories."""
    traced = next(record for record in records if record.traced)
    peak = traced.moments[Moment.PEAK]
    assert peak.total_bytes == peak.allocated_bytes == FACTS["peak_requested"]
    assert peak.total_bytes == pytest.approx(132.8e9, rel=0.001)
    parameters = FACTS["parameters"]
    assert peak[Category.WEIGHTS] == peak[Category.GRADIENTS] == 2 * parameters
    assert peak[Category.MASTER_WEIGHTS] == 4 * parameters
    assert peak[Category.OPTIMIZER_STATE] == 8 * parameters
    for breakdown in traced.moments.values():
        assert breakdown.total_bytes == breakdown.allocated_bytes


def test_the_table_is_drawn_as_it_was_printed(records: list[StepRecord]) -> None:
    """Every figure of the table that the run printed is in the table of its record, in the same place."""
    traced = next(record for record in records if record.traced)
    printed = (RUN / "table.txt").read_text(encoding="utf-8")
    drawn = render_text(traced, TABLE_WIDTH)
    lines = [line.split() for line in drawn.splitlines()]
    for line in printed.splitlines():
        if line.startswith("■"):
            assert line.split() in lines
    assert f"{FACTS['peak_requested'] / 2**30:.2f}" in drawn


def test_the_report_is_drawn(tmp_path: Path) -> None:
    """`memtrace report` makes a page of the run; a browser draws its figures and finds nothing wrong."""
    target = tmp_path / "report.html"
    assert main(["report", str(RUN), "--output", str(target)]) == 0
    with page() as (opened, wrong, _):
        opened.goto(target.as_uri())
        opened.wait_for_function("document.querySelectorAll('.plotly-graph-div .main-svg').length > 0")
        text = opened.inner_text("body")
    assert wrong == []
    assert "highest peak 123.70 GiB" in text


@pytest.mark.parametrize("name", [name for name in BREAKDOWNS if name != REPLAYED])
def test_recorded_breakdowns_add_up(name: str) -> None:
    """Law 1 on the device: every moment of every engine, optimizer and setting, to the byte."""
    for moment in ("forward_end", "step_end", "peak"):
        found = BREAKDOWNS[name][moment]
        assert sum(found["entries"].values()) == found["sum"] == found["allocated"]


@pytest.mark.parametrize("name", [name for name in BREAKDOWNS if name not in (REPLAYED, ANOTHER_NETWORK)])
def test_what_was_there_and_nobody_claimed_is_what_cublas_keeps(name: str) -> None:
    """Under every engine it is both workspaces of Hopper and less than 2 KB besides: the rule has its sizes right."""
    entries = BREAKDOWNS[name]["step_end"]["entries"]
    unclaimed = entries[f"{Category.UNATTRIBUTED}/{Phase.OUTSIDE}/"]
    cublas, again, *_ = configured_sizes(9, {})
    assert 0 <= unclaimed - cublas - again < 2048

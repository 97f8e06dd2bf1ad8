"""Plans against the live tracer on a CPU, over model families, recipes and ways to run a step."""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path

import pytest
from laws.families import Combination
from planning.accuracy import RECIPES, Row, measure, rows
from planning.larger_families import CONVOLUTIONS

DOCS = Path(__file__).parents[2] / "docs"

ALL = list(rows())
SAMPLE = ALL[:: len(RECIPES) * 4 + 5]
"""One row of each family but one, with recipe and way changing from row to row."""


def check(row: Row) -> None:
    """What a plan promises on a CPU."""
    check_without_scratch(row)
    assert abs(row.peak_error) <= 0.01


def check_without_scratch(row: Row) -> None:
    """What it promises where kernels take memory inside."""
    planned, measured = row.persistent
    assert planned == measured
    assert abs(row.activations_error) <= 0.01


@pytest.mark.parametrize("combination", SAMPLE, ids=str)
def test_a_plan_is_what_the_live_tracer_measures(combination: Combination) -> None:
    """Persistent categories are equal, activations and the peak within 1 %."""
    check(measure(combination))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_plan_is_what_the_live_tracer_measures() -> None:
    """The same for the whole table, the peak within 0.1 % in the median: docs/accuracy.md, on every processor."""
    table = [measure(combination) for combination in ALL]
    convolutions = [measure(combination) for combination in rows(CONVOLUTIONS)]
    for row in table:
        check(row)
    assert statistics.median(abs(row.peak_error) for row in table) <= 0.001
    for row in convolutions:
        check_without_scratch(row)
    page = runpy.run_path(str(DOCS / "build_accuracy.py"))["render"](table, convolutions)
    assert (DOCS / "accuracy.md").read_text(encoding="utf-8") == page, "run python docs/build_accuracy.py"

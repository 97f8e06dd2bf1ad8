"""Plans against the live tracer on a CPU, over model families, recipes and ways to run a step."""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path

import pytest
from laws.families import Combination
from planning.accuracy import RECIPES, Row, measure, rows
from planning.larger_families import CONVOLUTIONS
from planning.published import OTHERS, PUBLISHED, WITHIN, compare

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
    published = [compare(figure) for figure in PUBLISHED]
    page = runpy.run_path(str(DOCS / "build_accuracy.py"))["render"](table, convolutions, published)
    assert (DOCS / "accuracy.md").read_text(encoding="utf-8") == page, "run python docs/build_accuracy.py"


def test_what_others_have_published_is_planned() -> None:
    """A head within a thousandth, BERT within 5 %, as the page says; a long test plans every row."""
    page = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    checkpointed = next(figure for figure in OTHERS if figure.setup.endswith("checkpointing, V100"))
    rows = [compare(figure) for figure in (OTHERS[0], checkpointed)]
    assert abs(rows[0].error) <= 0.001
    for row in rows:
        assert abs(row.error) <= WITHIN
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row.published.setup} |")]
        assert f"| {row.error:+.1%} |" in line


def test_a_published_row_that_is_off_says_why() -> None:
    """Read from the page, which a long test makes anew; each figure has its source and what it was measured by."""
    section = (DOCS / "accuracy.md").read_text(encoding="utf-8").partition("## Published measurements")[2]
    errors = {}
    for line in section.splitlines():
        if line.endswith(" |") and not line.startswith(("| training", "|---")):
            setup, by, *_, error, why, source = (cell.strip() for cell in line.strip("|").split("|"))
            errors[setup] = abs(float(error.rstrip("%"))) / 100
            assert by and source and (why or errors[setup] <= WITHIN)
    assert list(errors) == [figure.setup for figure in PUBLISHED]

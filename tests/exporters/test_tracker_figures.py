"""Figures for trackers: what each is, over which steps, and when there is none."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import GIB, PEAK_ENTRIES, breakdown, counted_step, full_snapshot, gpu_snapshot, steps, traced_step

from memtrace.exporters.trackers.figures import CATALOGUE, FORECAST, HEADROOM, PEAK, RISK, Figures, part_key
from memtrace.exporters.trackers.summary import history_of, page, table
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment

DOCS = Path(__file__).parents[2] / "docs"


def with_peak(step: int, gib: int, category: Category = Category.ACTIVATIONS) -> StepRecord:
    peak = breakdown(Moment.PEAK, {EntryKey(category, "", ""): gib * GIB})
    return traced_step(step=step, moments={Moment.PEAK: peak})


def test_each_figure_is_what_a_full_snapshot_says() -> None:
    """Sizes in GiB, the risk as it is; categories below one percent of the peak are left out."""
    figures, snapshot = Figures(), full_snapshot()
    assert snapshot.latest is not None and snapshot.headroom_bytes is not None
    figures.note(snapshot.latest)
    found = figures.take(snapshot)
    peak = sum(PEAK_ENTRIES.values())
    sizes = {part_key(category): snapshot.latest.moments[Moment.PEAK][category] / GIB for category in Category}
    assert found == {
        PEAK.key: peak / GIB,
        **{key: size for key, size in sizes.items() if size > 0.1 or key == part_key(Category.UNATTRIBUTED)},
        HEADROOM.key: snapshot.headroom_bytes / GIB,
        FORECAST.key: 30.0,
        RISK.key: 0.25,
    }
    assert part_key(Category.INPUTS) not in found


def test_the_peak_is_the_highest_since_the_call_before() -> None:
    """With its own categories; a second call without a step says the same, one after a step begins anew."""
    figures = Figures()
    for step, gib in ((1, 2), (2, 5), (3, 3)):
        figures.note(with_peak(step, gib))
    first = figures.take(gpu_snapshot())
    assert (first[PEAK.key], first[part_key(Category.ACTIVATIONS)]) == (5.0, 5.0)
    assert figures.take(gpu_snapshot()) == first
    figures.note(with_peak(4, 1, Category.TEMPORARIES))
    second = figures.take(gpu_snapshot())
    assert (second[PEAK.key], second[part_key(Category.TEMPORARIES)]) == (1.0, 1.0)
    assert second[part_key(Category.ACTIVATIONS)] == 0.0, "a category that had a figure keeps it"


def test_what_is_not_known_has_no_key() -> None:
    """No peak, no categories of it, no forecast; of an estimated peak not what only a trace can see."""
    figures = Figures()
    assert figures.take(gpu_snapshot()).keys() == {HEADROOM.key}
    figures.note(counted_step())
    assert figures.take(gpu_snapshot(counted_step())).keys() == {HEADROOM.key}
    figures.note(traced_step())
    figures.take(gpu_snapshot())
    held = breakdown(Moment.PEAK, {EntryKey(Category.WEIGHTS, "", ""): GIB}, estimated=True)
    figures.note(counted_step(moments={Moment.PEAK: held}))
    found = figures.take(gpu_snapshot())
    assert found[part_key(Category.WEIGHTS)] == 1.0
    assert found[part_key(Category.OPTIMIZER_STATE)] == 0.0, "the ledger knows that there is none"
    assert part_key(Category.TEMPORARIES) not in found


@settings(max_examples=20)
@given(st.lists(steps, max_size=3))
def test_whatever_the_steps_were_figures_are_floats(records: list[StepRecord]) -> None:
    """Of any records: plain floats under known keys, and no exception."""
    figures = Figures()
    for record in records:
        figures.note(record)
    found = figures.take(gpu_snapshot(records[-1] if records else None))
    known = {figure.key for figure in CATALOGUE} | {part_key(category) for category in Category}
    assert found.keys() <= known
    assert {type(value) for value in found.values()} <= {float}


def test_the_summary_has_the_last_traced_step_and_the_highest_timeline() -> None:
    """Before the first step there is neither."""
    empty = gpu_snapshot(latest=None, latest_traced=None)
    assert table(empty) is None
    assert history_of([], empty, None) is None
    snapshot = gpu_snapshot()
    assert "master_weights" in (table(snapshot) or "")
    run = history_of([traced_step(), replace(traced_step(), step=13)], snapshot, None)
    assert run is not None
    assert (run.name, [step.record.step for step in run.fullest.steps], run.fullest.timeline) == (
        "llama",
        [12, 13],
        None,
    )


def test_without_plotly_there_is_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra; the table does without."""
    run = history_of([traced_step()], gpu_snapshot(), None)
    assert run is not None and "<html" in (page(run) or "")
    monkeypatch.delitem(sys.modules, "memtrace.exporters.html")
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    assert page(run) is None


def test_the_page_is_that_of_the_catalogue() -> None:
    """docs/trackers.md is what docs/build_trackers.py makes of the figures."""
    page = runpy.run_path(str(DOCS / "build_trackers.py"))["render"]()
    assert (DOCS / "trackers.md").read_text(encoding="utf-8") == page, "run python docs/build_trackers.py"


@pytest.mark.parametrize("figure", CATALOGUE, ids=lambda figure: figure.key)
def test_a_key_ends_with_its_unit(figure: object) -> None:
    """Whoever reads a chart reads the unit."""
    assert figure.key.endswith(("_gib", "_ratio"))  # type: ignore[attr-defined]

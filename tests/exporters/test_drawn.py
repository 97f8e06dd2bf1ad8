"""Records that draw themselves in a notebook, and how that looks to a browser."""

from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import page
from records import full_snapshot, traced_step
from small_training import make, step
from test_html import HOSTILE, RUN, hostile

from memtrace import MemoryTracer
from memtrace.exporters.drawn.areas import MAX_POINTS, Areas, svg
from memtrace.exporters.drawn.notebook import RunDrawing
from memtrace.exporters.run_directory.run_history import RunHistory, observe
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.run_directory.timeline_file import StepTimeline
from memtrace.exporters.table import render_text
from memtrace.record.breakdown import History, StepCurve
from memtrace.record.categories import COLOURS, Category, Moment

CURVE = StepCurve(
    seconds=(0, 0.2, 0.5),
    by_category={Category.WEIGHTS: (4, 4, 4), Category.ACTIVATIONS: (0, 8, 2)},
    moments={Moment.FORWARD_END: 0.2, Moment.PEAK: 0.201, Moment.STEP_END: 0.5},
)


def drawing_of(name: str = "fine-tune", spoil: bool = False) -> RunDrawing:
    records = [hostile(record) if spoil else record for record in read_step_log(RUN)]
    rank = observe(records, limit_bytes=2**29)
    assert rank is not None
    return RunDrawing(run=RunHistory(name=name, ranks=[replace(rank, timeline=StepTimeline(step=7, curve=CURVE))]))


def heights(picture: str, category: Category) -> list[float]:
    """Returns how high the band of a category is at each point of its upper edge, in units of the picture."""
    points = re.search(rf'<polygon points="([^"]*)" fill="{COLOURS[category]}"', picture)
    assert points is not None
    edge = [float(point.split(",")[1]) for point in points[1].split()]
    half = len(edge) // 2
    return [below - above for above, below in zip(edge[:half], reversed(edge[half:]), strict=True)]


def test_drawings_open_without_an_error_or_a_script(tmp_path: Path) -> None:
    """In Chromium all of them are there, with markup of a log as text; nothing is asked for."""
    shown = [
        drawing_of(HOSTILE, spoil=True),
        History(hostile(record) for record in read_step_log(RUN)),
        replace(traced_step(), curve=CURVE, device=HOSTILE),
    ]
    html = "<hr>".join(part._repr_mimebundle_()["text/html"] for part in shown)  # type: ignore[attr-defined]
    file = tmp_path / "cell.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><link rel=icon href=data:,><title>cell</title>{html}")
    with page(width=900) as (opened, wrong, asked):
        opened.goto(file.as_uri())
        pictures = opened.locator("svg").count()
        colours = opened.evaluate("[...document.querySelectorAll('polygon')].map(band => getComputedStyle(band).fill)")
        words = opened.inner_text("body")
        title = opened.title()
    assert title == "cell"
    assert wrong == []
    assert len(asked) == 1
    assert pictures == 4, "the peaks of the run and of the history, two timelines"
    assert len(set(colours)) > 4
    assert "<script" not in html
    for said in ("Timeline of step 7", "forward end, peak", "sizes in", HOSTILE):
        assert said in words


def test_bands_are_as_high_as_their_bytes() -> None:
    """At each point in proportion to the highest; the sizes of an allocator hold until the next point."""
    areas = Areas(x=CURVE.seconds, by_category=CURVE.by_category, x_title="seconds")
    weights, activations = heights(svg(areas), Category.WEIGHTS), heights(svg(areas), Category.ACTIVATIONS)
    assert [round(size / weights[0] * 4, 1) for size in activations] == [0, 8, 2]
    held = heights(svg(replace(areas, holds=True)), Category.ACTIVATIONS)
    assert [round(size / weights[0] * 4, 1) for size in held] == [0, 0, 8, 8, 2]


def test_long_histories_keep_their_highest_points() -> None:
    """A picture has a bounded number of points, and none of them hides a peak."""
    count = 20 * MAX_POINTS
    sizes = [1 + (at == 4321) * 99 for at in range(count)]
    picture = svg(Areas(x=range(count), by_category={Category.WEIGHTS: sizes}, x_title="step"))
    drawn = heights(picture, Category.WEIGHTS)
    assert len(drawn) <= MAX_POINTS + 2
    assert max(drawn) == pytest.approx(100 * min(drawn), rel=0.05)
    assert len(picture) < 20_000


@pytest.mark.parametrize("sizes", [{}, {Category.WEIGHTS: (0, 0, 0)}], ids=["no category", "no byte"])
def test_without_bytes_there_is_no_picture(sizes: dict[Category, Any]) -> None:
    """Nothing is divided by nothing."""
    assert svg(Areas(x=CURVE.seconds, by_category=sizes, x_title="step")) == ""


def test_one_step_is_a_bar() -> None:
    """A curve of one point has a picture, too."""
    picture = svg(Areas(x=[3], by_category={Category.WEIGHTS: [5]}, x_title="step"))
    assert heights(picture, Category.WEIGHTS)[0] > 0
    assert "nan" not in picture


def test_the_text_is_the_table() -> None:
    """A terminal's IPython shows it; an empty history and data that nobody draws are shown as Python prints them."""
    record = full_snapshot().latest
    assert record is not None
    assert record._repr_mimebundle_()["text/plain"] == render_text(record)
    assert "What the peak" not in (record._repr_html_() or "")
    assert History()._repr_mimebundle_() == {}
    assert History()._repr_html_() is None
    assert repr(History()) == "()"
    assert repr(drawing_of()) == drawing_of()._repr_mimebundle_()["text/plain"]
    assert "<b>rank 0: risk 100%</b>" in (drawing_of()._repr_html_() or ""), "what to do first"


@pytest.mark.parametrize("where", ["notebook", "terminal"])
def test_show(where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook it draws below the cell, in the midst of a loop, too; elsewhere it is the table, on stderr."""
    displayed: list[Any] = []
    ipython = SimpleNamespace(
        get_ipython=lambda: object() if where == "notebook" else None, display=SimpleNamespace(display=displayed.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    if where == "notebook":  # rich finds it so, and would show all that it prints below the cell
        kernel = type("ZMQInteractiveShell", (), {})
        monkeypatch.setattr(builtins, "get_ipython", kernel, raising=False)
        shown = SimpleNamespace(display=displayed.append)
        monkeypatch.setitem(sys.modules, "IPython.display", shown)
    model, optimizer = make()
    with MemoryTracer(model, optimizer, port=None, step_log=False, strict=True, quiet=True, trace_every=1) as tracer:
        tracer.show()
        assert displayed == []
        step(model, optimizer)
        step(model, optimizer)
        tracer.show()
    said = capsys.readouterr().err
    if where == "notebook":
        assert said == ""
        (drawn,) = displayed
        html = drawn._repr_html_()
        assert "What the peak of each step is made of" in html
        assert "Timeline of step" in html
        assert "steps 1 to 2" in html
    else:
        assert displayed == []
        assert "sizes in MiB" in said
    assert isinstance(tracer.history, tuple)
    assert "polygon" in tracer.history._repr_html_()

"""The report of a run, and how it looks to a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from browser import page

from memtrace.exporters.drawn.first_things import first_things
from memtrace.exporters.html import render_html
from memtrace.exporters.run_directory.run_history import MAX_STEPS, OomText, RankHistory, RunHistory, observe
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.run_directory.timeline_file import StepTimeline
from memtrace.record.breakdown import AllocatorReading, Breakdown, EntryKey, StepCurve, StepRecord
from memtrace.record.categories import Category, Moment

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "gpt2-eager-attention.jsonl"
ALL_DRAWN = "[...document.querySelectorAll('.plotly-graph-div')].every(div => div.querySelector('svg'))"
HOSTILE = '</script><img src=x onerror="document.title=1"><script>document.title="taken"</script>'


def history(limit_bytes: int | None = None, **changes: object) -> RankHistory:
    records = [replace(record, **changes) for record in read_step_log(RUN)]  # type: ignore[arg-type]
    found = observe(records, limit_bytes=limit_bytes)
    assert found is not None
    return found


def run(*ranks: RankHistory, name: str = "fine-tune", reports: tuple[OomText, ...] = ()) -> RunHistory:
    return RunHistory(name=name, ranks=ranks or (history(),), oom_reports=reports)


def hostile(record: StepRecord) -> StepRecord:
    """Returns the record with markup wherever a log has text."""
    moments = {}
    for moment, found in record.moments.items():
        entries = {EntryKey(key.category, HOSTILE, HOSTILE): size for key, size in found.entries.items()}
        moments[moment] = Breakdown(moment=moment, entries=entries, allocated_bytes=found.allocated_bytes)
    return replace(record, device=HOSTILE, moments=moments)


def test_page_opens_without_an_error_or_a_request(tmp_path: Path) -> None:
    """In Chromium every picture is drawn, the console stays empty, and nothing but the file is asked for."""
    file = tmp_path / "report.html"
    curve = StepCurve(seconds=(0, 0.5), by_category={Category.WEIGHTS: (4, 8)}, moments={Moment.PEAK: 0.5})
    gpu = replace(
        history(allocator=AllocatorReading(allocated_bytes=10**7, reserved_bytes=10**9)),
        timeline=StepTimeline(step=7, curve=curve),
    )
    other = replace(history(), rank=1)
    file.write_text(render_html(run(gpu, other, reports=(OomText(name="oom-rank0-x", text="# Out of memory"),))))
    with page() as (opened, wrong, asked):
        opened.goto(file.as_uri())
        opened.wait_for_function("document.querySelectorAll('.plotly-graph-div .main-svg').length > 0")
        drawn = opened.evaluate(
            "[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('svg'))"
        )
        headings = opened.locator("h2").all_inner_texts()
    assert drawn
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert headings[0] == "What to do first"
    assert {"What the peak is made of", "Forecast", "Peak against tokens", "Persistent memory"} <= set(headings)
    assert {"Timeline of step 7", "Allocator", "Ranks", "oom-rank0-x"} <= set(headings)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Markup in the name of the run, a device, a component or an out-of-memory report is shown, not run."""
    file = tmp_path / "report.html"
    found = observe((hostile(record) for record in read_step_log(RUN)), limit_bytes=None)
    assert found is not None
    file.write_text(render_html(run(found, name=HOSTILE, reports=(OomText(name=HOSTILE, text=HOSTILE),))))
    with page() as (opened, wrong, asked):
        opened.goto(file.as_uri())
        opened.wait_for_function("document.querySelectorAll('.plotly-graph-div .main-svg').length > 0")
        title, heading = opened.title(), opened.locator("h1").inner_text()
        shown = opened.locator("pre").inner_text()
    assert title == f"memtrace: {HOSTILE}"
    assert heading == HOSTILE
    assert shown == HOSTILE
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_quiet_run_has_nothing_to_do_first() -> None:
    """A run with room to spare is told so."""
    assert list(first_things(run())) == []
    assert "no risk, no leak and nothing unknown" in render_html(run())


def test_risk_comes_with_what_to_do() -> None:
    """A run whose limit is below its largest peak is told which rank, how likely, and a remedy."""
    what, words = next(first_things(run(history(limit_bytes=2**29))))
    assert what == "rank 0: risk 100%"
    assert "gradient checkpointing" in words


def test_ranks_that_differ_are_told() -> None:
    """A rank that takes much more than another is named."""
    small = history()
    emptier = replace(small, rank=1, steps=[step for step in small.steps if (step.peak_bytes or 0) < 4 * 10**7])
    assert "rank 0 takes" in dict(first_things(run(small, emptier)))["ranks differ"]


def test_unused_reserve_is_told() -> None:
    """A reserve that no peak has used is fragmentation."""
    gpu = history(allocator=AllocatorReading(allocated_bytes=10**7, reserved_bytes=10**9))
    assert "expandable_segments" in dict(first_things(run(gpu)))["fragmentation"]


def test_memory_of_nobody_is_told() -> None:
    """A peak of which more than a tenth is unattributed is not called complete."""
    record = next(read_step_log(RUN))
    sizes = {EntryKey(Category.WEIGHTS, "", ""): 800, EntryKey(Category.UNATTRIBUTED, "", ""): 200}
    peak = Breakdown(moment=Moment.PEAK, entries=sizes, allocated_bytes=1000)
    found = observe([replace(record, moments={**record.moments, Moment.PEAK: peak})], limit_bytes=None)
    assert found is not None
    assert "held by nobody" in dict(first_things(run(found)))["unattributed memory"]


def test_long_logs_are_thinned() -> None:
    """Of a log of any length a bounded number of steps is kept, the first and the last among them."""
    record = next(read_step_log(RUN))
    light = replace(record, moments={}, traced=False)
    found = observe((replace(light, step=step) for step in range(1, 3 * MAX_STEPS)), limit_bytes=None)
    assert found is not None
    assert len(found.steps) <= MAX_STEPS + 1
    assert (found.steps[0].record.step, found.last.record.step) == (1, 3 * MAX_STEPS - 1)


def test_an_empty_log_has_no_history() -> None:
    """A rank without a step is left out."""
    assert observe([], limit_bytes=None) is None


@pytest.mark.parametrize("path", sorted(RUN.parent.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_recorded_run_has_a_report(path: Path) -> None:
    """The report of each recorded run has the pictures of a run on a CPU."""
    found = observe(read_step_log(path), limit_bytes=None)
    assert found is not None
    assert render_html(run(found)).count("plotly-graph-div") == 5

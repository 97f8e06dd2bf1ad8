"""What a notebook shows of a record, of a history, and of a whole run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

from rich.console import Console

from memtrace.exporters.drawn.areas import Areas, svg
from memtrace.exporters.drawn.first_things import first_things
from memtrace.exporters.run_directory.run_history import RunHistory
from memtrace.exporters.table import TABLE_WIDTH, render_text, step_table
from memtrace.record.breakdown import Drawn, History, StepCurve, StepRecord, drawing
from memtrace.record.categories import Category, Moment
from memtrace.record.units import format_bytes

_TABLE = '<pre style="font:12px/1.35 ui-monospace,Menlo,Consolas,monospace;overflow-x:auto;margin:8px 0">{code}</pre>'


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDrawing(Drawn):
    """A run so far, to be drawn: what to do first, its peaks, the timeline of its highest step, its table."""

    run: RunHistory

    def __repr__(self) -> str:
        return render_text(_latest_traced([step.record for step in self.run.fullest.steps]))


@drawing.register
def _of_record(record: StepRecord) -> dict[str, str]:
    parts = [] if record.curve is None else _timeline(record.step, record.curve)
    return {"text/plain": render_text(record), "text/html": "".join([*parts, _table(record)])}


@drawing.register
def _of_history(history: History) -> dict[str, str]:
    if not history:
        return {}
    shown = _latest_traced(history)
    return {"text/plain": render_text(shown), "text/html": "".join([*_peaks(history), _table(shown)])}


@drawing.register
def _of_run(drawn: RunDrawing) -> dict[str, str]:
    rank = drawn.run.fullest
    records = [step.record for step in rank.steps]
    facts = [f"steps {records[0].step} to {records[-1].step}"]
    if rank.highest_peak:
        facts.append(f"highest peak {format_bytes(rank.highest_peak)}")
    parts = [f"<b>{escape(drawn.run.name)}</b> {escape(' · '.join(facts))}"]
    parts += [f"<div><b>{escape(what)}</b>: {escape(words)}</div>" for what, words in first_things(drawn.run)]
    parts += _peaks(records)
    if rank.timeline is not None:
        parts += _timeline(rank.timeline.step, rank.timeline.curve)
    parts.append(_table(_latest_traced(records)))
    return {"text/plain": repr(drawn), "text/html": f'<div style="font:13px sans-serif">{"".join(parts)}</div>'}


def _latest_traced(records: Sequence[StepRecord]) -> StepRecord:
    return next((record for record in reversed(records) if record.traced), records[-1])


def _peaks(records: Sequence[StepRecord]) -> Iterator[str]:
    known = [(record.step, record.moments[Moment.PEAK]) for record in records if Moment.PEAK in record.moments]
    if len(known) > 1:
        by_category = {category: [peak[category] for _, peak in known] for category in Category}
        yield "<div>What the peak of each step is made of</div>"
        yield svg(Areas(x=[step for step, _ in known], by_category=by_category, x_title="step"))


def _timeline(step: int, curve: StepCurve) -> Iterator[str]:
    if not curve.seconds:
        return
    yield f"<div>Timeline of step {step}, from its begin to its end</div>"
    yield svg(
        Areas(
            x=[1000 * second for second in curve.seconds],
            by_category=curve.by_category,
            x_title="milliseconds",
            holds=True,
            marks={moment.value.replace("_", " "): 1000 * second for moment, second in curve.moments.items()},
        )
    )


def _table(record: StepRecord) -> str:
    """Returns the table with its colours, on whatever background the notebook has; rich escapes its text."""
    console = Console(
        file=StringIO(),
        width=TABLE_WIDTH,
        color_system="truecolor",
        force_terminal=True,
        force_jupyter=False,  # which would show it below the cell at once
        legacy_windows=False,
        record=True,
        _environ={},
    )
    console.print(step_table(record))
    html = console.export_html(code_format=_TABLE, inline_styles=True)
    return html.replace("background-color: #ffffff", "background-color: transparent")  # of the bars' empty ends

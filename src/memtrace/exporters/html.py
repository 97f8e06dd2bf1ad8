"""The report of a run as one HTML file that needs nothing else: no server, no network.

All text that a log or a file name brings along is escaped; a policy in the page forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from memtrace.exporters.drawn.first_things import first_things
from memtrace.exporters.drawn.page import page_head
from memtrace.exporters.figures import figures
from memtrace.exporters.run_directory.run_history import RunHistory
from memtrace.exporters.table import printable
from memtrace.record.units import format_bytes


def render_html(run: RunHistory) -> str:
    """Returns the page: what to do first, the pictures, the reports of failures."""
    parts = [*_head(run), *_first(run), *_pictures(run), *_failures(run)]
    return "\n".join([*parts, "</body></html>", ""])


def _head(run: RunHistory) -> Iterator[str]:
    name = escape(run.name)
    first, last = run.fullest.steps[0].record, run.fullest.last.record
    facts = [
        f"{len(run.ranks)} ranks" if len(run.ranks) > 1 else "1 rank",
        f"steps {first.step} to {last.step}",
        f"highest peak {format_bytes(run.fullest.highest_peak)}" if run.fullest.highest_peak else "no peak known",
        last.device,
        *([f"launch {printable(last.run_id)}"] if last.run_id else []),
    ]
    yield page_head(run.name, get_plotlyjs())
    yield f"<h1>{name}</h1><p>{escape(' · '.join(facts))}</p>"


def _first(run: RunHistory) -> Iterator[str]:
    yield "<h2>What to do first</h2><table>"
    things = list(first_things(run)) or [("nothing", "no risk, no leak and nothing unknown was found in these steps")]
    for what, words in things:
        yield f"<tr><td>{escape(what)}</td><td>{escape(words)}</td></tr>"
    yield "</table>"


def _pictures(run: RunHistory) -> Iterator[str]:
    for title, words, figure in figures(run):
        yield f"<h2>{escape(title)}</h2><p>{escape(words)}</p>"
        yield to_html(figure, full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def _failures(run: RunHistory) -> Iterator[str]:
    for report in run.oom_reports:
        yield f"<h2>{escape(report.name)}</h2><pre>{escape(report.text)}</pre>"

"""The report of a run as one HTML file that needs nothing else: no server, no network.

All text that a log or a file name brings along is escaped; a policy in the page forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from memtrace.exporters.drawn.first_things import first_things
from memtrace.exporters.figures import figures
from memtrace.exporters.run_history import RunHistory
from memtrace.exporters.table import printable
from memtrace.record.units import format_bytes

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; margin: 0 auto; max-width: 1100px; padding: 16px }
h1 { font-size: 24px; margin: 8px 0 } h2 { font-size: 18px; margin: 28px 0 2px }
p { margin: 2px 0 8px; color: #57606a }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: 6px 12px 6px 0;
border-bottom: 1px solid #d0d7de; vertical-align: top } td:first-child { white-space: nowrap; font-weight: 600 }
pre { background: #f6f8fa; padding: 12px; overflow-x: auto; font-size: 13px }
"""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


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
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>memtrace: {name}</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield f'<link rel="icon" href="data:,"><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>'
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

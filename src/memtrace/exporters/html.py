"""The report of a run as one HTML file that needs nothing else: no server, no network.

All text that a log or a file name brings along is escaped; a policy in the page forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from memtrace.exporters.figures import figures
from memtrace.exporters.run_history import RankHistory, RunHistory
from memtrace.exporters.table import printable
from memtrace.record.categories import Category, Moment
from memtrace.record.units import format_bytes
from memtrace.risk import WARN_AT, advise

UNATTRIBUTED_SHARE = 0.10
"""Share of the peak held by nobody from which a report speaks of it; as in the alert rules."""
FRAGMENTED_SHARE = 0.25
"""Share of the reserve that no peak has used from which a report speaks of it; as in the alert rules."""
IMBALANCE_SHARE = 0.15
"""Distance between the ranks' peaks, as a share of the highest, from which a report speaks of it."""

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


def first_things(run: RunHistory) -> Iterator[tuple[str, str]]:
    """Yields what to do first: what is wrong, and what about it; the most urgent first."""
    if run.oom_reports:
        yield (
            "out of memory",
            f"{len(run.oom_reports)} reports below say who held the memory and what would have helped",
        )
    for rank in run.ranks:
        risk = rank.last.risk
        words = advise(risk)
        if words is not None and risk.oom_risk_ratio is not None and risk.oom_risk_ratio >= WARN_AT:
            yield f"rank {rank.rank}: risk {risk.oom_risk_ratio:.0%}", words
    fullest = run.fullest
    yield from _unattributed(fullest)
    yield from _fragmented(fullest)
    lowest = min(rank.highest_peak for rank in run.ranks)
    if fullest.highest_peak - lowest > IMBALANCE_SHARE * fullest.highest_peak:
        yield (
            "ranks differ",
            f"rank {fullest.rank} takes {format_bytes(fullest.highest_peak - lowest)} more than the emptiest rank and "
            "limits the batch of all: balance the batches, or look at what only it does",
        )


def _unattributed(rank: RankHistory) -> Iterator[tuple[str, str]]:
    if not rank.with_peak:
        return
    peak = rank.with_peak[-1].record.moments[Moment.PEAK]
    unknown = peak[Category.UNATTRIBUTED]
    if unknown > UNATTRIBUTED_SHARE * peak.total_bytes:
        yield (
            "unattributed memory",
            f"{format_bytes(unknown)} of the peak of rank {rank.rank} are held by nobody that memtrace knows: tensors "
            "kept over steps, or buffers of a library",
        )


def _fragmented(rank: RankHistory) -> Iterator[tuple[str, str]]:
    allocator = rank.last.record.allocator
    if allocator is None or not rank.highest_peak:
        return
    unused = allocator.reserved_bytes - rank.highest_peak
    if unused > FRAGMENTED_SHARE * allocator.reserved_bytes:
        yield (
            "fragmentation",
            f"{format_bytes(unused)} of what torch holds on rank {rank.rank} have been used by no peak: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True, or pad lengths to fewer sizes",
        )


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

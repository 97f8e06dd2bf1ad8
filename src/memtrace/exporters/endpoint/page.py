"""The page at `/` of the endpoint: what the newest snapshot says, for people."""

from __future__ import annotations

from html import escape

from memtrace.exporters.table import printable, render_text
from memtrace.record.snapshot import Snapshot

_STYLE = "body{font:15px sans-serif;margin:24px}pre{font:13px monospace;overflow-x:auto}"


def render_page(snapshot: Snapshot) -> str:
    """Returns the page: which run this is, how it is, the table of its last traced step, a link to the metrics."""
    run = snapshot.identity
    record = snapshot.latest_traced or snapshot.latest
    title = escape(printable(f"{run.run_name}, rank {run.rank} of {run.world_size}, {run.device}"))
    state = snapshot.state if snapshot.up else f"{snapshot.state}, memtrace is off"
    facts = escape(printable(f"{state} \u00b7 {snapshot.totals.steps} steps \u00b7 launch {run.run_id or 'not known'}"))
    table = "no step has ended yet" if record is None else render_text(record)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>memtrace: {title}</title>"
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{title}</h1><p>{facts}</p>'
        f'<pre>{escape(table)}</pre><p><a href="metrics">metrics</a></p></body></html>\n'
    )

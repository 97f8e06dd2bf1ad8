"""What a tracker keeps of a run that has ended: the table of its last traced step, and the report as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memtrace.exporters.run_directory.run_history import RunHistory, observe
from memtrace.exporters.run_directory.timeline_file import StepTimeline
from memtrace.exporters.table import render_text
from memtrace.record.breakdown import StepRecord
from memtrace.record.snapshot import Snapshot


def table(snapshot: Snapshot) -> str | None:
    """Returns the table that is shown at the end of a run; None before its first step."""
    record = snapshot.latest_traced or snapshot.latest
    return None if record is None else render_text(record)


def history_of(records: Sequence[StepRecord], snapshot: Snapshot, max_tokens: int | None) -> RunHistory | None:
    """Returns the recent steps of one rank as a run, forecast again; None where there is none.

    Args:
        records: the recent steps, oldest first.
        snapshot: the state of the same tracer.
        max_tokens: the largest micro batch that the run could meet, as the settings say.
    """
    rank = observe(records, limit_bytes=snapshot.limit_bytes, max_tokens=max_tokens)
    if rank is None:
        return None
    curves = [StepTimeline(step=record.step, curve=record.curve) for record in records if record.curve is not None]
    rank = replace(rank, timeline=curves[-1] if curves else None)  # each is of a higher peak than those before
    return RunHistory(name=snapshot.identity.run_name, ranks=[rank])


def page(run: RunHistory) -> str | None:
    """Returns the report of a run; None where the extra `report` is not installed."""
    try:
        from memtrace.exporters.html import render_html  # noqa: PLC0415 - plotly takes a second to import
    except ImportError:
        return None
    return render_html(run)

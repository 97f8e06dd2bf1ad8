"""A finished run as the states that its exporters would have shown, one after each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from memtrace.record.breakdown import StepRecord
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot
from memtrace.risk import RiskMonitor


def states(records: Iterable[StepRecord], identity: RunIdentity, ended: RunState | None) -> Iterator[Snapshot]:
    """Yields the state after each step, forecast again step by step, and the last one once more as it has ended.

    Args:
        records: the steps of one rank and launch, in order. Steps that were skipped without a record count by their
            numbers.
        identity: of the rank.
        ended: how it has ended; None where nobody knows.
    """
    monitor = RiskMonitor(None)
    state, first = Snapshot(identity=identity), None
    for record in records:
        first = record if first is None else first
        totals = state.totals.after(record)
        state = replace(
            state,
            begun_unix_seconds=first.unix_seconds - (first.step_seconds or 0.0),
            totals=replace(totals, steps=record.step - first.step + 1),
            latest=record,
            latest_traced=record if record.traced else state.latest_traced,
        )
        state = replace(state, risk=monitor.observe(record, headroom_bytes=state.headroom_bytes))
        yield state
    if first is not None and ended is not None:
        yield replace(state, state=ended)

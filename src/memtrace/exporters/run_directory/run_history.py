"""What a report shows of a run: its ranks, each with its steps and what was forecast after them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memtrace.exporters.run_directory.timeline_file import StepTimeline
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.risk_reading import RiskReading, largest_by_setting
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.risk import RiskMonitor

MAX_STEPS = 2000
"""Steps of a rank that are kept: beyond it every second one is dropped, so that a report stays one that opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One step with what was forecast after it."""

    record: StepRecord
    risk: RiskReading

    @property
    def peak_bytes(self) -> int | None:
        """Bytes at the peak; None where it is not known."""
        peak = self.record.moments.get(Moment.PEAK)
        return None if peak is None else peak.held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHistory:
    """The steps of one rank, oldest first, at least one."""

    rank: int
    steps: Sequence[Observed]
    timeline: StepTimeline | None = None
    """The traced step with the highest peak; None where the run left no such file."""

    @property
    def last(self) -> Observed:
        """The newest step."""
        return self.steps[-1]

    @property
    def with_peak(self) -> Sequence[Observed]:
        """The steps whose peak is known."""
        return [step for step in self.steps if step.peak_bytes is not None]

    @property
    def highest_peak(self) -> int:
        """The highest known peak in bytes; 0 where none is known."""
        return max((step.peak_bytes or 0 for step in self.steps), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OomText:
    """An out-of-memory report as it was written."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHistory:
    """A run as its log directory tells it."""

    name: str
    ranks: Sequence[RankHistory]
    """At least one, in the order of the ranks."""
    oom_reports: Sequence[OomText] = ()

    @property
    def fullest(self) -> RankHistory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.highest_peak)


def observe(
    records: Iterable[StepRecord],
    *,
    limit_bytes: int | None = None,
    max_tokens: int | None = None,
) -> RankHistory | None:
    """Returns the history of one rank, forecast again step by step; None where it has no step.

    Args:
        records: all steps of the rank, in order. The forecast learns from every one; `MAX_STEPS` at most are kept.
        limit_bytes: what the run may use of its device; None means all of it.
        max_tokens: the largest micro batch that the run could meet; None means the largest one seen so far.
    """
    monitor = RiskMonitor(largest_by_setting(max_tokens))
    kept: list[Observed] = []
    stride, last = 1, None
    for number, record in enumerate(records):
        snapshot = Snapshot(
            identity=RunIdentity(run_name="", rank=record.rank, device=record.device),
            latest=record,
            limit_bytes=limit_bytes,
        )
        last = Observed(record=record, risk=monitor.observe(record, headroom_bytes=snapshot.headroom_bytes))
        if number % stride == 0:
            kept.append(last)
        if len(kept) > MAX_STEPS:
            kept, stride = kept[::2], 2 * stride
    if last is None:
        return None
    if kept[-1] is not last:
        kept.append(last)
    return RankHistory(rank=last.record.rank, steps=kept)

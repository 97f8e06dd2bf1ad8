"""What to do first about a run: what is wrong, and a remedy. The report as a page has it too."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.exporters.run_directory.run_history import RankHistory, RunHistory
from memtrace.record.categories import Category, Moment
from memtrace.record.units import format_bytes
from memtrace.risk import WARN_AT, advise

UNATTRIBUTED_SHARE = 0.10
"""Share of the peak held by nobody from which a report speaks of it; as in the alert rules."""
FRAGMENTED_SHARE = 0.25
"""Share of the reserve that no peak has used from which a report speaks of it; as in the alert rules."""
IMBALANCE_SHARE = 0.15
"""Distance between the ranks' peaks, as a share of the highest, from which a report speaks of it."""


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

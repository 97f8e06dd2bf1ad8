"""The peak of a step without a trace: measured where the allocator's high-water mark rose in it, else estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from memtrace.record.breakdown import AllocatorReading, Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import PERSISTENT, Category, Moment, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class HighWater:
    """What the allocator's own high-water mark says of one step. Bytes as requested; None where it says nothing."""

    peak_bytes: int | None = None
    """The step's peak: the mark rose between two readings of the step."""
    bound_bytes: int | None = None
    """What the step's peak cannot exceed: the mark, as long as nobody reset it within the step."""
    was_reset: bool = False
    """Whether somebody has reset the mark since the reading before."""


def high_water(before: AllocatorReading | None, readings: Sequence[AllocatorReading]) -> HighWater:
    """Returns what the readings of one step say of its peak.

    A mark that an evaluation between two steps has raised belongs to no step: only what rises after the first reading
    of the step counts. A reset shows as a mark that falls; one that has been passed again before the next reading
    cannot be seen, and takes nothing away from what is said here.

    Args:
        before: the last reading of the step before; None where there is none.
        readings: the readings of the step, in order: the first before its first forward pass, the last at its end.
    """
    marks = [mark for reading in readings if (mark := _mark(reading)) is not None]
    earlier = None if before is None else _mark(before)
    fell = any(later < sooner for sooner, later in pairwise(marks))
    was_reset = fell or (earlier is not None and bool(marks) and marks[0] < earlier)
    if len(marks) < 2 or fell:
        return HighWater(was_reset=was_reset)
    bound = marks[-1] if readings[-1].peak_requested_bytes is not None else marks[-1] - _rounding(readings[-1])
    return HighWater(peak_bytes=bound if marks[-1] > marks[0] else None, bound_bytes=bound, was_reset=was_reset)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakReference:
    """What a traced step teaches about the peaks of the steps after it."""

    peak: Breakdown
    forward_added: int
    """Bytes that its largest forward pass added, by the counters, without autocast's copies of weights."""
    casts: int
    """Those copies: they do not follow the batch."""

    @classmethod
    def of(cls, moments: Mapping[Moment, Breakdown], forward_added: int | None) -> Self | None:
        """Returns the reference that a traced step makes; None where its counters or its moments do not tell."""
        peak, forward_end = moments.get(Moment.PEAK), moments.get(Moment.FORWARD_END)
        if peak is None or forward_end is None or forward_added is None:
            return None
        casts = forward_end[Category.TRANSIENT_WEIGHTS]
        return cls(peak=peak, forward_added=forward_added - casts, casts=casts) if forward_added > casts else None


def counted_peak(
    reference: PeakReference | None,
    known: Mapping[Moment, Breakdown],
    forward_added: int | None,
    water: HighWater,
) -> Breakdown | None:
    """Returns the peak of a counted step, marked as estimated; None where nothing is known of it.

    Its composition is that of the last traced peak: what the ledger knows as it is now, what follows the batch scaled
    by what the forward pass added; or that of the end of the forward pass, where that is more. What follows the batch
    is then fitted to the high-water mark: exactly to one that rose in the step, and to one that did not where the
    estimate exceeds it.

    Args:
        reference: what the last traced step teaches.
        known: the counted step's own moments.
        forward_added: bytes that its largest forward pass added, by the counters.
        water: what the high-water mark says.

    Returns:
        A breakdown whose `allocated_bytes` is the measured peak, and None where the peak is an estimate too.
    """
    candidates = [known[Moment.FORWARD_END].entries] if Moment.FORWARD_END in known else []
    if reference is not None and forward_added is not None:
        candidates.append(_scaled_trace(reference, known[Moment.STEP_END], forward_added))
    elif water.peak_bytes is None:
        return None
    entries = max(candidates, key=lambda found: sum(found.values()), default=known[Moment.STEP_END].entries)
    if water.peak_bytes is not None:
        entries = _fitted(entries, water.peak_bytes)
    elif water.bound_bytes is not None and sum(entries.values()) > water.bound_bytes:
        entries = _fitted(entries, water.bound_bytes)
    return Breakdown(
        moment=Moment.PEAK, entries=ordered_entries(entries), allocated_bytes=water.peak_bytes, estimated=True
    )


def _mark(reading: AllocatorReading) -> int | None:
    requested = reading.peak_requested_bytes
    return reading.peak_allocated_bytes if requested is None else requested


def _rounding(reading: AllocatorReading) -> int:
    return 0 if reading.requested_bytes is None else reading.allocated_bytes - reading.requested_bytes


def _follows_batch(key: EntryKey) -> bool:
    """Whether an entry grows with the batch. Temporaries of the optimizer do not, nor do gradients and casts."""
    if key.category is Category.TEMPORARIES:
        return key.component not in (Phase.OPTIMIZER, Phase.OUTSIDE)
    return key.category in (Category.ACTIVATIONS, Category.INPUTS)


def _scaled_trace(reference: PeakReference, step_end: Breakdown, forward_added: int) -> Mapping[EntryKey, int]:
    ratio = max(0.0, (forward_added - reference.casts) / reference.forward_added)
    # At the peak some gradients are there and some are not, and buffers of collectives that no step ends with.
    standing = PERSISTENT - {Category.GRADIENTS, Category.COMM_BUFFERS}
    entries = {key: size for key, size in step_end.entries.items() if key.category in standing}
    for key, size in reference.peak.entries.items():
        if key.category not in standing:
            entries[key] = round(ratio * size) if _follows_batch(key) else size
    return entries


def _fitted(entries: Mapping[EntryKey, int], total: int) -> Mapping[EntryKey, int]:
    """Returns the entries with what follows the batch scaled so that they add up to `total`, where that can be."""
    following = {key: size for key, size in entries.items() if _follows_batch(key)}
    whole = sum(following.values())
    left = max(0, total - (sum(entries.values()) - whole))
    if not whole:
        return entries
    fitted, done, given = dict(entries), 0, 0
    for key, size in following.items():  # rounded so that no byte is lost
        done += size
        fitted[key] = left * done // whole - given
        given += fitted[key]
    return fitted

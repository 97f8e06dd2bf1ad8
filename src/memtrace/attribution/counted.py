"""What is known of a step without a trace: the ledger's entries, and activations from the allocator's counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.peaks import HighWater, PeakReference, counted_peak, high_water
from memtrace.attribution.scan import Scan
from memtrace.breakdown import AllocatorReading, Breakdown, EntryKey, ordered_entries
from memtrace.categories import PERSISTENT, Category, Moment
from memtrace.sources.events import Tag


class CountedSteps:
    """Makes the breakdowns of steps without a trace, and remembers what their estimates need of the steps before.

    Args:
        scan: whose gradients there are.
        ledger: what is known of all else; its device is the one that is watched.
    """

    def __init__(self, scan: Scan, ledger: Ledger) -> None:
        self._scan, self._ledger = scan, ledger
        self._reference: PeakReference | None = None
        self._last: AllocatorReading | None = None

    def water(self, readings: Sequence[AllocatorReading]) -> HighWater:
        """Returns what the readings of a step say of its peak; called for every step, in order."""
        water = high_water(self._last, readings)
        self._last = readings[-1] if readings else None
        return water

    def learn(self, moments: Mapping[Moment, Breakdown], forward_added: int | None) -> None:
        """Takes in a traced step: its moments, and what its largest forward pass has added by the counters."""
        self._reference = PeakReference.of(moments, forward_added)

    def moments(
        self,
        before_forward: AllocatorReading | None,
        readings: Mapping[Moment, AllocatorReading],
        forward_added: int | None,
        water: HighWater,
    ) -> Mapping[Moment, Breakdown]:
        """Returns the moments that are known of a step that ends now, with an estimate of its peak where there is one.

        Args:
            before_forward: the counters before the last forward pass; None on a device without counters.
            readings: the counters at the moments of the step.
            forward_added: bytes that the largest forward pass has added, by the counters.
            water: what the high-water mark says of the step.
        """
        self._scan.claim_kept(self._ledger)
        gradients = self._scan.gradient_bytes(self._ledger.device)
        hidden = self._scan.hidden_bytes()
        known = counted_moments(self._ledger.totals(), {**gradients, **hidden}, before_forward, readings)
        peak = counted_peak(self._reference, known, forward_added, water)
        return known if peak is None else {**known, Moment.PEAK: peak}


def counted_moments(
    ledger_totals: Mapping[Tag, int],
    counted: Mapping[EntryKey, int],
    before_forward: AllocatorReading | None,
    readings: Mapping[Moment, AllocatorReading],
) -> dict[Moment, Breakdown]:
    """Returns the breakdowns of a counted step, marked as estimated.

    Args:
        ledger_totals: bytes of each tag in the ledger. Categories that follow the batch are left out.
        counted: what was counted at the end of the step and is not taken from the ledger: the gradients that there are
            then, and buffers that no Python object refers to.
        before_forward: the counters before the last forward pass; None on a device without counters.
        readings: the counters at the moments of the step.

    Returns:
        Always step_end; forward_end where there are counters: what the forward pass added is its activations.
        Nothing is taken as the remainder of anything: the entries may add up to less than was allocated.
    """
    persistent = {
        EntryKey(*tag): size
        for tag, size in ledger_totals.items()
        if tag.category in PERSISTENT and tag.category is not Category.GRADIENTS
    }
    moments = {Moment.STEP_END: _estimate(Moment.STEP_END, {**persistent, **counted}, readings.get(Moment.STEP_END))}
    forward_end = readings.get(Moment.FORWARD_END)
    if before_forward is not None and forward_end is not None:
        before, after = before_forward.requested_bytes, forward_end.requested_bytes
        if before is not None and after is not None:
            added = {EntryKey(Category.ACTIVATIONS, "", ""): max(after - before, 0)}
            moments[Moment.FORWARD_END] = _estimate(Moment.FORWARD_END, {**persistent, **added}, forward_end)
    return moments


def _estimate(moment: Moment, entries: Mapping[EntryKey, int], reading: AllocatorReading | None) -> Breakdown:
    return Breakdown(
        moment=moment,
        entries=ordered_entries(entries),
        allocated_bytes=None if reading is None else reading.requested_bytes,
        estimated=True,
    )

"""What is known of a step without a trace: the ledger's entries, and activations from the allocator's counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.peaks import HighWater, PeakReference, counted_peak, high_water
from memtrace.attribution.scan import Scan
from memtrace.record.breakdown import AllocatorReading, Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import PERSISTENT, Category, Moment
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
        self._totals: Mapping[Tag, int] = {}
        """The ledger's totals at the end of the step before."""
        self._counted: Mapping[EntryKey, int] = {}
        """What was counted then and is not taken from the ledger."""
        self._persistent: Mapping[EntryKey, int] = {}
        self._at_end: Mapping[EntryKey, int] = {}
        """The entries that follow from both: mostly those of the next step, too."""
        self._told: tuple[object, ...] = ()
        """What the moments below follow from, beside those entries."""
        self._moments: Mapping[Moment, Breakdown] = {}
        """Those of the last step: a step of the same shape has the same ones."""

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
        self._look()
        before = None if before_forward is None else before_forward.requested_bytes
        requested = [(moment, reading.requested_bytes) for moment, reading in readings.items()]
        told = self._reference, self._at_end, before, requested, forward_added, water
        if told != self._told:
            known = counted_moments(self._persistent, self._at_end, before_forward, readings)
            peak = counted_peak(self._reference, known, forward_added, water)
            self._told, self._moments = told, known if peak is None else {**known, Moment.PEAK: peak}
        return self._moments

    def _look(self) -> None:
        """Looks what there is at the end of a step: the gradients and hidden buffers of now, all else by the ledger."""
        totals = self._ledger.totals()
        counted = {**self._scan.gradient_bytes(self._ledger.device), **self._scan.hidden_bytes()}
        if totals is not self._totals or counted != self._counted:
            self._totals, self._counted = totals, counted
            self._persistent = {
                EntryKey(*tag): size
                for tag, size in totals.items()
                if tag.category in PERSISTENT and tag.category is not Category.GRADIENTS
            }
            self._at_end = ordered_entries({**self._persistent, **counted})


def counted_moments(
    persistent: Mapping[EntryKey, int],
    at_end: Mapping[EntryKey, int],
    before_forward: AllocatorReading | None,
    readings: Mapping[Moment, AllocatorReading],
) -> dict[Moment, Breakdown]:
    """Returns the breakdowns of a counted step, marked as estimated.

    Args:
        persistent: what the ledger has of the categories that do not follow the batch, gradients left out.
        at_end: the same with what was counted at the end of the step: the gradients that there are then, and buffers
            that no Python object refers to. Ordered.
        before_forward: the counters before the last forward pass; None on a device without counters.
        readings: the counters at the moments of the step.

    Returns:
        Always step_end; forward_end where there are counters: what the forward pass added is its activations.
        Nothing is taken as the remainder of anything: the entries may add up to less than was allocated.
    """
    moments = {Moment.STEP_END: _estimate(Moment.STEP_END, at_end, readings.get(Moment.STEP_END))}
    forward_end = readings.get(Moment.FORWARD_END)
    if before_forward is not None and forward_end is not None:
        before, after = before_forward.requested_bytes, forward_end.requested_bytes
        if before is not None and after is not None:
            added = {EntryKey(Category.ACTIVATIONS, "", ""): max(after - before, 0)}
            entries = ordered_entries({**persistent, **added})
            moments[Moment.FORWARD_END] = _estimate(Moment.FORWARD_END, entries, forward_end)
    return moments


def _estimate(moment: Moment, entries: Mapping[EntryKey, int], reading: AllocatorReading | None) -> Breakdown:
    return Breakdown(
        moment=moment,
        entries=entries,
        allocated_bytes=None if reading is None else reading.requested_bytes,
        estimated=True,
    )

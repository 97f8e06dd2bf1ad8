"""The peak of a counted step: what the high-water mark says, and what the last trace and the counters foretell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memtrace.attribution.peaks import HighWater, PeakReference, counted_peak, high_water
from memtrace.record.breakdown import AllocatorReading, Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import Category, Moment, Phase

WEIGHTS = EntryKey(Category.WEIGHTS, "trainable", "float32")
GRADIENTS = EntryKey(Category.GRADIENTS, "", "float32")
ACTIVATIONS = EntryKey(Category.ACTIVATIONS, "", "float32")
COUNTED_ACTIVATIONS = EntryKey(Category.ACTIVATIONS, "", "")
CASTS = EntryKey(Category.TRANSIENT_WEIGHTS, "autocast", "bfloat16")
IN_BACKWARD = EntryKey(Category.TEMPORARIES, Phase.BACKWARD, "")
IN_OPTIMIZER = EntryKey(Category.TEMPORARIES, Phase.OPTIMIZER, "")
UNKNOWN = HighWater()


def reading(mark: int, *, requested_mark: int | None = None, allocated: int = 100) -> AllocatorReading:
    return AllocatorReading(
        allocated_bytes=allocated + 12,
        reserved_bytes=2000,
        requested_bytes=allocated,
        peak_allocated_bytes=mark,
        peak_requested_bytes=requested_mark,
    )


def breakdown(moment: Moment, entries: dict[EntryKey, int]) -> Breakdown:
    return Breakdown(moment=moment, entries=ordered_entries(entries))


def traced(*, added: int = 400, casts: int = 0, peak: dict[EntryKey, int] | None = None) -> PeakReference | None:
    at_peak = {WEIGHTS: 100, GRADIENTS: 60, ACTIVATIONS: 400, IN_BACKWARD: 40, CASTS: casts}
    moments = {
        Moment.PEAK: breakdown(Moment.PEAK, at_peak if peak is None else peak),
        Moment.FORWARD_END: breakdown(Moment.FORWARD_END, {WEIGHTS: 100, ACTIVATIONS: 400, CASTS: casts}),
    }
    return PeakReference.of(moments, added)


def counted(*, weights: int = 100, activations: int | None = None) -> dict[Moment, Breakdown]:
    moments = {Moment.STEP_END: breakdown(Moment.STEP_END, {WEIGHTS: weights, GRADIENTS: 100})}
    if activations is not None:
        entries = {WEIGHTS: weights, COUNTED_ACTIVATIONS: activations}
        moments[Moment.FORWARD_END] = breakdown(Moment.FORWARD_END, entries)
    return moments


class TestHighWater:
    """What a row of readings says."""

    def test_a_mark_that_rose_within_the_step_is_its_peak(self) -> None:
        """As requested: the allocator's own mark of it, or the rounded one less the rounding at the end."""
        assert high_water(None, [reading(900), reading(900), reading(1000)]).peak_bytes == 1000 - 12
        marks = [reading(900, requested_mark=880), reading(1000, requested_mark=970)]
        assert high_water(None, marks).peak_bytes == 970

    def test_a_mark_that_stood_is_a_bound(self) -> None:
        """The step took no more than something before it."""
        assert high_water(reading(900), [reading(900), reading(900)]) == HighWater(bound_bytes=900 - 12)

    def test_what_rose_between_two_steps_belongs_to_neither(self) -> None:
        """An evaluation between them."""
        assert high_water(reading(500), [reading(900), reading(900)]).peak_bytes is None

    def test_a_reset_between_two_steps_is_noticed_and_frees_the_mark(self) -> None:
        """From then on the mark is this step's own."""
        water = high_water(reading(900), [reading(200), reading(600)])
        assert water == HighWater(peak_bytes=600 - 12, bound_bytes=600 - 12, was_reset=True)

    def test_a_reset_within_the_step_leaves_its_peak_unknown(self) -> None:
        """What was before it is gone."""
        assert high_water(reading(900), [reading(900), reading(300), reading(400)]) == HighWater(was_reset=True)

    def test_a_device_without_counters_says_nothing(self) -> None:
        """A CPU."""
        assert high_water(None, []) == UNKNOWN
        assert high_water(None, [AllocatorReading(allocated_bytes=1, reserved_bytes=2)] * 3) == UNKNOWN


class TestCountedPeak:
    """Composition and size."""

    def test_the_same_batch_has_the_traced_peak(self) -> None:
        """To the byte, and it says estimated, without a count of the allocator's."""
        peak = counted_peak(traced(), counted(), 400, UNKNOWN)
        assert peak is not None
        assert dict(peak.entries) == {WEIGHTS: 100, GRADIENTS: 60, ACTIVATIONS: 400, IN_BACKWARD: 40}
        assert (peak.estimated, peak.allocated_bytes) == (True, None)

    def test_what_follows_the_batch_is_scaled_and_nothing_else(self) -> None:
        """Half the batch, weights of now; gradients as at the traced peak."""
        peak = counted_peak(traced(), counted(weights=120), 200, UNKNOWN)
        assert peak is not None
        assert dict(peak.entries) == {WEIGHTS: 120, GRADIENTS: 60, ACTIVATIONS: 200, IN_BACKWARD: 20}

    def test_casts_of_weights_do_not_follow_the_batch(self) -> None:
        """The forward pass adds them in any case: 500 and 300 are 400 and 200 of the batch's own."""
        peak = counted_peak(traced(added=500, casts=100), counted(), 300, UNKNOWN)
        assert peak is not None
        assert (peak[Category.ACTIVATIONS], peak[Category.TRANSIENT_WEIGHTS]) == (200, 100)

    def test_temporaries_of_the_optimizer_do_not_either(self) -> None:
        """A peak inside `step()` stays where it is while the batch is small."""
        reference = traced(peak={WEIGHTS: 100, GRADIENTS: 100, IN_OPTIMIZER: 300})
        peak = counted_peak(reference, counted(activations=40), 40, UNKNOWN)
        assert peak is not None
        assert dict(peak.entries) == {WEIGHTS: 100, GRADIENTS: 100, IN_OPTIMIZER: 300}

    def test_it_is_never_below_the_end_of_the_forward_pass(self) -> None:
        """The same peak inside `step()` before a batch that is ten times as large."""
        reference = traced(peak={WEIGHTS: 100, GRADIENTS: 100, IN_OPTIMIZER: 300})
        peak = counted_peak(reference, counted(activations=4000), 4000, UNKNOWN)
        assert peak is not None
        assert dict(peak.entries) == {WEIGHTS: 100, COUNTED_ACTIVATIONS: 4000}

    def test_a_mark_that_rose_is_met_exactly(self) -> None:
        """The estimate's 600 become the measured 733, by what follows the batch."""
        peak = counted_peak(traced(), counted(), 400, HighWater(peak_bytes=733, bound_bytes=733))
        assert peak is not None
        assert (peak.allocated_bytes, peak.total_bytes, peak.held_bytes) == (733, 733, 733)
        assert (peak[Category.WEIGHTS], peak[Category.GRADIENTS]) == (100, 60)

    def test_a_mark_that_stood_is_not_exceeded(self) -> None:
        """Twice the batch would take 1040, and nothing ever took more than 900."""
        peak = counted_peak(traced(), counted(), 800, HighWater(bound_bytes=900))
        assert peak is not None
        assert (peak.allocated_bytes, peak.total_bytes) == (None, 900)

    def test_before_the_first_trace_only_a_measured_peak_is_told(self) -> None:
        """With what is known of its composition; without a mark that rose there is none."""
        assert counted_peak(None, counted(activations=300), 300, HighWater(bound_bytes=900)) is None
        peak = counted_peak(None, counted(activations=300), 300, HighWater(peak_bytes=500, bound_bytes=500))
        assert peak is not None
        assert (peak.allocated_bytes, dict(peak.entries)) == (500, {WEIGHTS: 100, COUNTED_ACTIVATIONS: 400})

    def test_without_counters_there_is_no_peak(self) -> None:
        """On a CPU nothing is told that was not measured."""
        assert traced(added=0) is None
        assert counted_peak(traced(), counted(), None, UNKNOWN) is None

    @given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12), st.booleans())
    def test_no_reading_breaks_it(self, added: int, activations: int, mark: int, rose: bool) -> None:
        """No entry below 0, a measured peak as measured, and within the bound unless what stands exceeds it."""
        water = HighWater(peak_bytes=mark if rose else None, bound_bytes=mark)
        peak = counted_peak(traced(), counted(activations=activations), added, water)
        assert peak is not None
        assert all(size > 0 for size in peak.entries.values())
        assert peak.allocated_bytes == (mark if rose else None)
        assert peak.total_bytes <= max(mark, 160)

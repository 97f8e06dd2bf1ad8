"""How many entries become few series, with nothing lost from any sum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from records import entry_keys

from memtrace.exporters.series import MAX_ENTRY_SERIES, MAX_PLAN_SERIES, READERS, fold
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.metrics import CATALOGUE, EXPORTED_MOMENTS

Sizes = dict[tuple[Moment, EntryKey], int]

entries = st.dictionaries(st.tuples(st.sampled_from(EXPORTED_MOMENTS), entry_keys), st.integers(1, 2**40), max_size=60)


def sums(sizes: Sizes) -> dict[tuple[Moment, Category], int]:
    found: dict[tuple[Moment, Category], int] = {}
    for (moment, key), size in sizes.items():
        found[moment, key.category] = found.get((moment, key.category), 0) + size
    return found


def test_every_metric_has_one_reader() -> None:
    """Catalogue and readers name the same metrics, in the same order."""
    assert tuple(READERS) == CATALOGUE


@given(entries, st.integers(len(EXPORTED_MOMENTS) * len(Category), 60))
def test_folding_keeps_the_limit_and_the_sums(sizes: Sizes, limit: int) -> None:
    """At most `limit` entries are left, and each category's sum at each moment is the same."""
    folded = fold(sizes, limit)
    assert len(folded) <= limit
    assert sums(folded) == sums(sizes)


@given(entries)
def test_nothing_is_folded_within_the_limit(sizes: Sizes) -> None:
    """Where there is room for all, all stay as they are."""
    assert fold(sizes, len(sizes)) == sizes


def test_the_smallest_are_folded() -> None:
    """The largest components keep their names; the others of the category are added up as `other`."""
    sizes = {
        (Moment.PEAK, EntryKey(Category.OPTIMIZER_STATE, f"state{number}", "float32")): number + 1
        for number in range(100)
    }
    folded = fold(sizes, 22)
    kept = {key.component for _, key in folded}
    assert kept == {"other", *(f"state{number}" for number in range(79, 100))}
    assert folded[Moment.PEAK, EntryKey(Category.OPTIMIZER_STATE, "other", "")] == sum(range(1, 80))


def test_a_small_category_keeps_its_name() -> None:
    """The only entry of a category is not renamed because others are larger: that would save nothing."""
    inputs = (Moment.PEAK, EntryKey(Category.INPUTS, "", "int64"))
    sizes = {(Moment.PEAK, EntryKey(Category.BUFFERS, f"buffer{number}", "float32")): 1000 for number in range(100)}
    assert fold(sizes | {inputs: 1}, 22)[inputs] == 1


def test_the_limit_is_enough_for_every_category() -> None:
    """Each category can have a series at each moment."""
    assert len(EXPORTED_MOMENTS) * len(Category) <= MAX_ENTRY_SERIES - MAX_PLAN_SERIES

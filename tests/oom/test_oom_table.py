"""A table of failures on a CUDA device: the report names what filled it, and what would have helped most."""

from __future__ import annotations

import pytest
from cuda_scenes import CASES, Case, report_of

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_top_category_is_named(case: Case) -> None:
    """The largest category of the report is what fills the device."""
    assert next(iter(report_of(case).composition.by_category())) is case.top


@by_name
def test_sum_is_what_the_allocator_counts(case: Case) -> None:
    """Every live block of the device is in the composition, once; blocks of other devices are not."""
    composition = report_of(case).composition
    assert composition.complete
    assert composition.total_bytes == composition.allocated_bytes == case.live_bytes


@by_name
def test_remedy_that_saves_most_comes_first(case: Case) -> None:
    """The first remedy is the one for this composition, and all are ranked by bytes."""
    remedies = report_of(case).remedies
    assert (remedies[0].kind if remedies else None) == case.remedy
    saved = [remedy.saved_bytes for remedy in remedies]
    assert saved == sorted(saved, reverse=True)


@by_name
def test_only_untraced_splits_are_marked_as_estimated(case: Case) -> None:
    """The composition is marked where counters have told activations from other unclaimed blocks."""
    has_unknown = any(tag is None for tag, *_ in case.held)
    hidden_only = sum(tag is None for tag, *_ in case.held) == len(case.hidden)
    expected = has_unknown and not case.traced and case.phase != "outside" and not hidden_only
    assert report_of(case).composition.estimated == expected

"""Recordings under other settings: each helps one history and hurts another, and the one that helps most is first."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from allocator_histories import FRAGMENTING, longer_and_longer, one_after_the_other, recording
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrace.allocator.recording import AllocatorRecording
from memtrace.allocator.settings import AllocatorSettings
from memtrace.allocator.what_if import MAX_FRAGMENTS, candidates, replayed, what_if
from memtrace.errors import ConfigError
from memtrace.record.units import GIB, MIB

PLAIN = AllocatorSettings()
GROWS = AllocatorSettings(expandable_segments=True)
UNSPLIT = AllocatorSettings(max_split_size=128 * MIB)
ROUNDED = AllocatorSettings(roundup_power2_divisions=4)
COLLECTS = AllocatorSettings(garbage_collection_threshold=0.5)

HELPS = {
    GROWS: longer_and_longer(FRAGMENTING, layers=2),
    UNSPLIT: [200 * MIB, -1, 30 * MIB, 200 * MIB],  # the large block is not cut up for a small one
    ROUNDED: one_after_the_other([size * MIB for size in range(100, 112, 2)]),
    COLLECTS: one_after_the_other([size * MIB for size in (300, 310, 320, 330)]),
}
HURTS = {
    GROWS: [11 * MIB],  # a page of 20 MiB where a segment has 12
    UNSPLIT: [200 * MIB, -1, *[50 * MIB] * 4],  # nobody gets what is cached
    ROUNDED: [65 * MIB] * 8,  # 80 MiB each
}


@pytest.mark.parametrize("setting", HELPS, ids=lambda setting: setting.text)
def test_a_setting_helps(setting: AllocatorSettings) -> None:
    """There is a history for which it reserves less than torch's defaults do."""
    history = recording(*HELPS[setting], limit_bytes=16 * GIB if setting is not COLLECTS else GIB)
    found = what_if(history, others=[setting])
    assert found.ranked[0].settings == setting
    assert found.saved_bytes(found.ranked[0]) > 0


@pytest.mark.parametrize("setting", HURTS, ids=lambda setting: setting.text)
def test_a_setting_hurts(setting: AllocatorSettings) -> None:
    """There is a history for which it reserves more, and then the setting in force is first."""
    found = what_if(recording(*HURTS[setting]), others=[setting])
    assert found.ranked[0].in_force
    assert found.saved_bytes(found.ranked[1]) < 0


def test_collecting_costs_calls_of_the_device() -> None:
    """What was given back is needed again: the same is reserved in the end, with more calls."""
    history = [400 * MIB, -1, 500 * MIB, -2, 1000, 500 * MIB, 400 * MIB]
    plain, collects = (replayed(recording(*history), setting, GIB) for setting in (PLAIN, COLLECTS))
    assert collects.device_calls > plain.device_calls
    assert collects.reserved_bytes == plain.reserved_bytes


def test_fragmentation_by_varying_lengths_is_found() -> None:
    """Expandable segments free more than half of the slack of texts of many lengths, and are first."""
    history = recording(*longer_and_longer(FRAGMENTING), peak_reserved_bytes=None)
    found = what_if(history)
    best = found.ranked[0]
    assert best.settings == GROWS
    assert found.in_force.reserved_bytes / best.reserved_bytes > 1.5  # torchtune #1185: 16.39 to 10.83 GiB
    assert found.saved_bytes(best) > found.in_force.slack_bytes / 2
    assert [outcome.needed_bytes for outcome in found.ranked] == sorted(o.needed_bytes for o in found.ranked)


def test_a_failed_request_would_have_fitted() -> None:
    """Where the device has no more, those settings are first under which the run goes on."""
    events = longer_and_longer(FRAGMENTING)
    limit = what_if(recording(*events), others=[GROWS]).ranked[0].reserved_bytes + 40 * MIB
    made = recording(*events, limit_bytes=limit, failed_bytes=30 * MIB)
    found = what_if(replace(made, events=made.events[:-1]))
    verdicts = {outcome.settings: outcome.fits for outcome in found.ranked}
    assert verdicts[GROWS] is True
    assert found.ranked[0].fits
    assert [outcome.fits for outcome in found.ranked] == sorted(verdicts.values(), reverse=True)


def test_a_pin_is_named() -> None:
    """2 MiB of optimizer state hold back 198 MiB; the fragment says what it is and where it lay."""
    history = recording(
        *[200 * MIB, -1, 2 * MIB, 200 * MIB],
        labels=[0, 1, 0],
        names=["activations", "optimizer_state exp_avg float32"],
        addresses=[0x7000, 0x9000, 0xB000],
    )
    found = what_if(history, others=())
    (fragment,) = found.fragments
    (pin,) = fragment.pins
    assert (fragment.size, fragment.free_bytes, fragment.pinned_by) == (200 * MIB, 198 * MIB, 1)
    assert (pin.nbytes, pin.name, pin.address) == (2 * MIB, "optimizer_state exp_avg float32", 0x9000)


def test_free_segments_are_no_fragments() -> None:
    """What lies in segments without a block in use is cached: a retry gives it back."""
    found = what_if(recording(30 * MIB, 40 * MIB, -1, -2, 60 * MIB), others=())
    assert not found.fragments
    assert found.cached_bytes == 70 * MIB
    cut_up = what_if(recording(*longer_and_longer(FRAGMENTING)), others=[GROWS])
    assert 0 < len(cut_up.fragments) <= MAX_FRAGMENTS
    growing = what_if(recording(50 * MIB, -1, 2 * MIB, 70 * MIB, settings="expandable_segments:True"), others=())
    assert all(fragment.pins for fragment in growing.fragments)


def test_blocks_that_were_there_before() -> None:
    """They are allocated first, in order, and can be freed; how far the model is off cannot be told then."""
    history = AllocatorRecording(sizes_at_begin=[30 * MIB, 3 * MIB], events=[-1, 28 * MIB, -3, -2])
    found = what_if(history, others=())
    assert found.in_force.reserved_bytes == 50 * MIB
    assert found.missed_ratio is None
    made = recording(3 * MIB, peak_reserved_bytes=20 * MIB)
    assert what_if(made).missed_ratio == 0
    assert what_if(made, limit=2 * MIB).missed_ratio is None


def test_an_emptied_cache() -> None:
    """0 gives back what is cached, under each setting."""
    found = what_if(recording(30 * MIB, -1, 0, 40 * MIB), others=[GROWS])
    assert [outcome.reserved_bytes for outcome in found.ranked] == [40 * MIB] * 2


def test_processes_find_the_same() -> None:
    """Two processes share the settings; what they find does not depend on it."""
    history = recording(*longer_and_longer(FRAGMENTING[:2], layers=2), limit_bytes=16 * GIB)
    assert what_if(history, workers=2) == what_if(history, workers=1)


def test_the_candidates() -> None:
    """The setting in force and torch's defaults are among them, none twice; collecting needs a limit."""
    found = candidates(GROWS, collects=True)
    assert found[0] == GROWS
    assert PLAIN in found
    assert len(set(found)) == len(found) == 8
    assert not any(setting.garbage_collection_threshold for setting in candidates(PLAIN, collects=False))
    more = what_if(recording(MIB), more=[AllocatorSettings(max_split_size=300 * MIB)])
    assert len(more.ranked) == len(candidates(PLAIN, collects=False)) + 1


def test_another_allocator_is_refused() -> None:
    """A recording of cudaMallocAsync is none."""
    with pytest.raises(ConfigError, match="another allocator"):
        what_if(recording(MIB, settings="backend:cudaMallocAsync"))


SIZES = st.one_of(st.integers(1, 3 * MIB), st.integers(MIB, 60 * MIB))


@st.composite
def histories(draw: st.DrawFn) -> AllocatorRecording:
    """Any allocations and frees."""
    events: list[int] = []
    live: list[int] = []
    blocks = 0
    for action in draw(st.lists(st.one_of(SIZES, st.integers(-50, -1)), max_size=60)):
        if action > 0:
            events.append(action)
            live.append(blocks)
            blocks += 1
        elif live:
            events.append(-live.pop(action % len(live)) - 1)
    return recording(*events)


@settings(max_examples=60)
@given(history=histories())
def test_what_is_monotone(history: AllocatorRecording) -> None:
    """What docs/allocator.md says: finer steps never allocate more, and a bound that is not reached changes nothing."""
    rounded = [
        replayed(history, AllocatorSettings(roundup_power2_divisions=steps, expandable_segments=True), None)
        for steps in (2, 4, 8, 16, 0)
    ]
    assert all(coarse.most_allocated_bytes >= fine.most_allocated_bytes for coarse, fine in pairwise(rounded))
    plain = replayed(history, PLAIN, None)
    peak = max(plain.reserved_bytes, 1)
    for unreached, limit in (
        (PLAIN, peak),
        (AllocatorSettings(garbage_collection_threshold=0.5), 2 * peak),
        (AllocatorSettings(max_split_size=61 * MIB), None),
    ):
        found = replayed(history, unreached, limit)
        assert (found.reserved_bytes, found.device_calls, found.retries) == (
            plain.reserved_bytes,
            plain.device_calls,
            0,
        )
    for setting in (PLAIN, GROWS, ROUNDED, UNSPLIT):
        limit = peak * 3 // 4
        found = replayed(history, setting, limit)
        assert found.reserved_bytes <= limit
        assert found.reserved_bytes >= found.allocated_bytes >= found.requested_bytes
        assert found.fits is (found.stopped_at is None)
        assert found.fits or found.needed_bytes > limit

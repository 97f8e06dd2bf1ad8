"""Snapshots of CUDA's caching allocator, made by hand in the forms that versions of torch give them."""

from __future__ import annotations

from typing import Any

import pytest

from memtrace.attribution.timeline import StepMarks, replay
from memtrace.errors import LogFormatError
from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Category, Moment
from memtrace.sources.cuda.allocator import live_blocks, parse_counters
from memtrace.sources.cuda.history import parse_window
from memtrace.sources.events import Block, Event, Tag, TagEvent

US = 1000
BEGIN, END = 1_000 * US, 9_000 * US


def entry(action: str, time_us: int, address: int, size: int, **more: Any) -> dict[str, Any]:
    """One entry of the history, with the fields that torch adds."""
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": time_us, "frames": [], **more}


def block(address: int, size: int, requested: int, state: str = "active_allocated") -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": []}


def segment(*blocks: dict[str, Any], device: int = 0, address: int = 0) -> dict[str, Any]:
    return {"device": device, "address": address, "total_size": 1 << 21, "segment_type": "small", "blocks": [*blocks]}


def snapshot(*history: Any, segments: Any = (), device: int = 0) -> dict[str, Any]:
    """A snapshot with history on one of two devices."""
    traces: list[list[Any]] = [[], []]
    traces[device] = [*history]
    return {"segments": [*segments], "device_traces": traces, "allocator_settings": {}, "something_new": 1}


def window(snapshot: Any, live_at_begin: tuple[Block, ...] = (), device: int = 0) -> Any:
    return parse_window(snapshot, device, BEGIN, END, live_at_begin)


class TestHistory:
    """Entries become events."""

    def test_allocations_and_completed_frees(self) -> None:
        """Sizes as requested, times in nanoseconds, in the allocator's order."""
        found = window(snapshot(entry("alloc", 2000, 0x10, 100), entry("free_completed", 3000, 0x10, 100)))
        assert list(found.events) == [Event(2000 * US, 0x10, 100), Event(3000 * US, 0x10, -100)]
        assert (found.complete, found.live_at_begin, found.resolution_ns) == (True, (), US)

    def test_a_requested_free_is_not_yet_one(self) -> None:
        """The block waits for another stream and cannot be used again: it is live until the free is completed."""
        waiting = segment(block(0x10, 512, 100, "active_awaiting_free"))
        found = window(
            snapshot(entry("alloc", 2000, 0x10, 100), entry("free_requested", 3000, 0x10, 100), segments=[waiting])
        )
        assert [event.delta for event in found.events] == [100]
        assert found.complete

    def test_what_is_neither_is_passed_over(self) -> None:
        """Segments, out-of-memory notes, snapshots, and actions that torch may add."""
        others = [
            entry(action, 2000, 0x10, 100)
            for action in ("segment_alloc", "segment_free", "segment_map", "oom", "snapshot", "user_defined", "new")
        ]
        assert not window(snapshot(*others)).events

    def test_entries_of_another_form_are_passed_over(self) -> None:
        """Missing fields, other types, no sizes: a history from another version of torch is still read."""
        odd = [
            {"action": "alloc", "addr": 1, "size": 1},
            entry("alloc", 2000, 0x10, 0),
            entry("alloc", 2000, 0x10, -4),
            {**entry("alloc", 2000, 0x10, 4), "addr": None},
            {**entry("alloc", 2000, 0x10, 4), "time_us": "2000"},
            "text",
            None,
        ]
        assert not window(snapshot(*odd)).events

    def test_the_history_of_another_device_is_not_read(self) -> None:
        """Each device has its own; one that the snapshot does not know has none."""
        recorded = snapshot(entry("alloc", 2000, 0x10, 100), device=1)
        assert not window(recorded, device=0).events
        assert not window(recorded, device=7).events
        segments = [segment(block(0x10, 512, 100), device=1)]
        found = window({**recorded, "segments": segments}, device=1)
        assert [event.delta for event in found.events] == [100]
        assert found.complete

    def test_what_was_before_the_window_is_left_out(self) -> None:
        """A user's own history goes back further; the microsecond in which the window began belongs to it."""
        early = entry("alloc", 999, 0x20, 5), entry("free_completed", 999, 0x20, 5)
        found = window(snapshot(*early, entry("alloc", 1000, 0x10, 100), segments=[segment(block(0x10, 512, 100))]))
        assert [event.address for event in found.events] == [0x10]

    @pytest.mark.parametrize("broken", [None, [], {}, {"device_traces": None}, {"segments": []}])
    def test_what_is_no_snapshot(self, broken: Any) -> None:
        """The message says what was expected."""
        with pytest.raises(LogFormatError, match="must have a list 'device_traces'"):
            window(broken)


class TestCompleteness:
    """The history must lead from the blocks at the beginning to those at the end."""

    def test_it_does(self) -> None:
        """One block stays, one goes, one comes."""
        before = (Block(0x10, 100), Block(0x20, 200))
        after = [segment(block(0x10, 512, 100), block(0x30, 512, 300))]
        history = entry("free_completed", 2000, 0x20, 200), entry("alloc", 3000, 0x30, 300)
        assert window(snapshot(*history, segments=after), before).complete

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ((), [segment(block(0x10, 512, 100))]),
            ((Block(0x10, 100),), []),
            ((Block(0x10, 100),), [segment(block(0x10, 512, 90))]),
        ],
        ids=["an allocation was lost", "a free was lost", "both were lost"],
    )
    def test_events_were_lost(self, before: tuple[Block, ...], after: list[Any]) -> None:
        """The ring was too small, or somebody else has cleared it: no breakdown is made from such a window."""
        assert not window(snapshot(segments=after), before).complete

    def test_the_same_address_again(self) -> None:
        """Freed and allocated anew with another size."""
        history = (
            entry("free_completed", 2000, 0x10, 100),
            entry("alloc", 2001, 0x10, 60),
            entry("free_completed", 2002, 0x10, 60),
            entry("alloc", 2003, 0x10, 70),
        )
        assert window(snapshot(*history, segments=[segment(block(0x10, 512, 70))]), (Block(0x10, 100),)).complete


class TestLiveBlocks:
    """Blocks from the segments of a snapshot."""

    def test_states(self) -> None:
        """In use, or waiting for another stream; cached ones are not."""
        blocks = segment(
            block(0x00, 512, 100),
            block(0x200, 512, 200, "active_awaiting_free"),
            block(0x400, 512, 300, "active_pending_free"),
            block(0x600, 512, 0, "inactive"),
        )
        assert list(live_blocks([blocks], 0)) == [Block(0x00, 100), Block(0x200, 200), Block(0x400, 300)]

    def test_blocks_without_an_address(self) -> None:
        """Older versions of torch: they lie one after the other in their segment."""
        blocks = [block(0, 512, 100), block(0, 1024, 0, "inactive"), block(0, 512, 300)]
        for each in blocks:
            del each["address"]
        assert list(live_blocks([segment(*blocks, address=0x1000)], 0)) == [Block(0x1000, 100), Block(0x1600, 300)]

    def test_blocks_without_a_requested_size(self) -> None:
        """Older still: the rounded size is all there is."""
        old = block(0x10, 512, 0)
        del old["requested_size"]
        assert list(live_blocks([segment(old)], 0)) == [Block(0x10, 512)]

    def test_other_devices(self) -> None:
        """Segments of other devices are left out; a segment that names none belongs to the one device there is."""
        nameless = segment(block(0x30, 512, 3))
        del nameless["device"]
        segments = [segment(block(0x10, 512, 1), device=0), segment(block(0x20, 512, 2), device=1), nameless]
        assert list(live_blocks(segments, 1)) == [Block(0x20, 2), Block(0x30, 3)]

    @pytest.mark.parametrize("odd", [None, 3, [None, "text"], [{"device": 0, "blocks": [None, 7]}]])
    def test_other_forms(self, odd: Any) -> None:
        """Nothing is found, nothing is raised."""
        assert list(live_blocks(odd, 0)) == []


class TestCounters:
    """`memory_stats_as_nested_dict()`."""

    def test_all_of_them(self) -> None:
        """The pools' sums, now and at the peak."""

        def pools(current: int, peak: int) -> dict[str, Any]:
            return {"all": {"current": current, "peak": peak, "allocated": 0, "freed": 0}, "small_pool": {"current": 1}}

        stats = {
            "allocated_bytes": pools(1024, 4096),
            "reserved_bytes": pools(8192, 8192),
            "requested_bytes": pools(1000, 4000),
            "inactive_split_bytes": pools(512, 512),
            "num_alloc_retries": 2,
            "num_ooms": 1,
        }
        assert parse_counters(stats) == AllocatorReading(
            allocated_bytes=1024,
            reserved_bytes=8192,
            requested_bytes=1000,
            peak_allocated_bytes=4096,
            peak_requested_bytes=4000,
            inactive_split_bytes=512,
            retries=2,
            ooms=1,
        )

    def test_an_allocator_that_says_less(self) -> None:
        """Another backend: what it does not count is None, not 0."""
        stats = {"allocated_bytes": {"all": {"current": 1}}, "reserved_bytes": {"all": {"current": 2}}}
        assert parse_counters(stats) == AllocatorReading(allocated_bytes=1, reserved_bytes=2)

    @pytest.mark.parametrize("stats", [{}, {"allocated_bytes": {}}, {"allocated_bytes": {"all": {"current": 1}}}])
    def test_an_allocator_that_says_nothing(self, stats: Any) -> None:
        """Without the two basic counters there is no reading."""
        assert parse_counters(stats) is None


def test_a_snapshot_becomes_a_breakdown() -> None:
    """Law 1 on a hand-made step: weights that were there, a batch saved for backward, a temporary, a leak."""
    before = (Block(0x10, 400), Block(0x20, 64))
    history = (
        entry("alloc", 2000, 0x30, 128),
        entry("alloc", 2001, 0x40, 32),
        entry("free_requested", 2002, 0x40, 32),
        entry("free_completed", 2002, 0x40, 32),
        entry("free_completed", 4000, 0x30, 128),
        entry("alloc", 4001, 0x50, 8),
    )
    after = [segment(block(0x10, 512, 400), block(0x20, 512, 64), block(0x50, 512, 8))]
    found = window(snapshot(*history, segments=after), before)
    assert found.complete
    weights, saved = Tag(Category.WEIGHTS, "trainable", "float32"), Tag(Category.ACTIVATIONS, "", "float32")
    base = [TagEvent(BEGIN, 0x10, 400, weights)]
    notes = [TagEvent(2000 * US + 300, 0x30, 128, saved), TagEvent(2002 * US + 900, 0x40, 32, saved)]
    marks = StepMarks(begin_ns=BEGIN, end_ns=END, forward_end_ns=3000 * US, backward_end_ns=5000 * US)
    moments = replay(found, base, notes).moments(marks)
    for breakdown in moments.values():
        assert breakdown.total_bytes == breakdown.allocated_bytes
    assert moments[Moment.PEAK].by_category() == {
        Category.WEIGHTS: 400,
        Category.ACTIVATIONS: 160,
        Category.UNATTRIBUTED: 64,
    }
    assert moments[Moment.STEP_END].by_category() == {Category.WEIGHTS: 400, Category.UNATTRIBUTED: 72}

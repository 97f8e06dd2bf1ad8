"""Whose history a window reads, where it begins in the ring, and what becomes of the user's."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeAllocator

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources import recording_torch_private
from memtrace.sources.cuda.allocator import segments
from memtrace.sources.cuda.source import DEFAULT_EVENTS, MAX_EVENTS, MAX_FOREIGN_EVENTS, CudaEvents
from memtrace.sources.events import Block, Window


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    made = FakeAllocator().install(monkeypatch)
    made.allocate(0x10, 100)
    return made


def changes(window: Window) -> list[tuple[int, int]]:
    return [(address, delta) for _, address, delta in window.events.rows()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestOwnHistory:
    """Nobody records: the source does."""

    def test_records_reads_and_stops(self, allocator: FakeAllocator) -> None:
        """One window at a time, with the blocks that were there and what happened since."""
        source = CudaEvents(0)
        assert source.open()
        assert source.is_open
        assert not source.open()
        allocator.allocate(0x20)
        allocator.free(0x10)
        window = source.close()
        assert allocator.calls == ["record", "snapshot", "stop"]
        assert window.live_at_begin == (Block(0x10, 100),)
        assert changes(window) == [(0x20, 1000), (0x10, -100)]
        assert window.complete
        assert not source.is_open

    def test_abandoned(self, allocator: FakeAllocator) -> None:
        """What the source began it stops, once."""
        source = CudaEvents(0)
        source.abandon()
        assert source.open()
        source.abandon()
        source.abandon()
        assert allocator.calls.count("record") == allocator.calls.count("stop") == 1
        assert not source.is_open

    def test_a_full_ring_has_lost_events(self, allocator: FakeAllocator) -> None:
        """Also where what is left of it leads to the blocks that are live: a steady step ends as it began."""
        source = CudaEvents(0, max_events=4)
        assert source.open()
        for _ in range(5):
            allocator.allocate(0x20)
            allocator.free(0x20)
        assert not source.close().complete

    def test_the_ring_is_sized_for_the_step(self, allocator: FakeAllocator) -> None:
        """Two entries an allocation where requested frees are left out, some more in reserve, up to a limit."""
        sizes = []
        for expected in (None, 10, 300_000, 10_000_000):
            source = CudaEvents(0)
            assert source.open(expected)
            sizes.append(allocator.max_entries)
            source.close()
        assert sizes == [DEFAULT_EVENTS, DEFAULT_EVENTS, 760_000, MAX_EVENTS]
        assert CudaEvents(0).fits(300_000)
        assert not CudaEvents(0).fits(500_000)

    def test_three_entries_an_allocation_in_older_versions(
        self, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before torch 2.13 nothing can be left out."""

        def record(enabled: str | None, context: str | None = None, stacks: str = "", **options: int | bool) -> None:
            allocator.record(enabled, context, stacks, int(options.get("max_entries", 1)), clear_history=True)

        def older(
            enabled: str | None = "all",
            context: str | None = "all",
            stacks: str = "all",
            max_entries: int = 1,
            clear_history: bool = False,
        ) -> None:
            record(enabled, context, stacks, max_entries=max_entries, clear_history=clear_history)

        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", older)
        source = CudaEvents(0)
        assert source.open(200_000)
        assert allocator.max_entries == 760_000
        assert allocator.skipped == frozenset()
        allocator.allocate(0x20)
        allocator.free(0x20)
        window = source.close()
        assert window.complete
        assert not allocator.recording


class TestClock:
    """Events are put on our clock by the entries that opening a window leaves in the ring."""

    @pytest.mark.parametrize("clock_us", [-5_000, -40, 0, 40, 5_000])
    def test_what_the_clock_was_off_is_taken_out(self, allocator: FakeAllocator, clock_us: int) -> None:
        """No event is later than it was, nor earlier by more than the resolution says."""
        source = CudaEvents(0)
        assert source.open()
        allocator.clock_us = clock_us
        happened = []
        for address in range(0x100, 0x200):
            allocator.now_ns += 1_000_000
            allocator.allocate(address)
            happened.append(allocator.now_ns)
        window = source.close()
        assert window.complete
        early = [truth - time_ns for truth, time_ns in zip(happened, window.events.times_ns, strict=True)]
        assert min(early) >= 0
        assert max(early) < window.resolution_ns < 50_000

    def test_place_and_not_time_tells_what_came_after(self, allocator: FakeAllocator) -> None:
        """Events of a user's history from before the window stay out, however far the clock is off."""
        allocator.record(context=None)
        source = CudaEvents(0)
        allocator.clock_us = 20_000
        allocator.allocate(0x30)
        assert source.open()
        allocator.allocate(0x40)
        window = source.close()
        assert changes(window) == [(0x40, 1000)]
        assert window.complete


class TestUsersHistory:
    """The user records already."""

    def test_is_read_and_neither_stopped_nor_cleared(self, allocator: FakeAllocator) -> None:
        """Window after window."""
        allocator.record(context=None)
        source = CudaEvents(0)
        for address in (0x30, 0x40, 0x50):
            assert source.open()
            allocator.allocate(address)
            window = source.close()
            assert changes(window) == [(address, 1000)]
            assert window.complete
        assert source.open()
        source.abandon()
        assert allocator.recording
        assert "stop" not in allocator.calls
        assert [entry["addr"] for entry in allocator.ring if entry["action"] == "alloc"] == [0x30, 0x40, 0x50]

    def test_a_ring_that_lost_the_beginning_is_noticed(self, allocator: FakeAllocator) -> None:
        """Also where what is left leads to the blocks that are live."""
        allocator.record(context=None, max_entries=6)
        source = CudaEvents(0)
        assert source.open()
        for _ in range(5):
            allocator.allocate(0x30)
            allocator.free(0x30)
        segments = allocator.segments  # somebody else lists the segments, so that there is an entry like ours
        segments()
        assert not source.close().complete

    def test_with_stacks_it_is_left_alone(self, allocator: FakeAllocator, caplog: pytest.LogCaptureFixture) -> None:
        """Each trace would copy and symbolise all of it: one line says so, until it ends."""
        allocator.record()
        source = CudaEvents(0)
        assert not source.open()
        assert not source.open()
        assert "snapshot" not in allocator.calls
        assert len(warnings(caplog)) == 1
        assert "context=None" in caplog.text
        allocator.record(None)
        assert source.open()
        assert source.close().complete

    def test_stacks_that_only_the_events_have(self, allocator: FakeAllocator) -> None:
        """No block that is live has one yet: the first trace finds them, and there is no second."""
        allocator.record()
        allocator.live.clear()
        source = CudaEvents(0)
        assert source.open()
        allocator.allocate(0x30)
        source.close()
        assert not source.open()
        assert allocator.recording

    def test_one_that_may_be_long_is_left_alone(
        self, allocator: FakeAllocator, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The allocator's count since nobody recorded says how long at most."""
        source = CudaEvents(0)
        assert source.open()
        source.close()
        allocator.record(context=None)
        allocator.allocations += MAX_FOREIGN_EVENTS // 3
        assert source.open()
        source.close()
        allocator.allocations += 1
        assert not source.open()
        assert len(warnings(caplog)) == 1

    def test_one_without_events_is_recognised(self, allocator: FakeAllocator, caplog: pytest.LogCaptureFixture) -> None:
        """`enabled="state"` keeps one entry: no window is made of it, and none is opened again."""
        allocator.record("state", context=None)
        source = CudaEvents(0)
        assert source.open()
        allocator.allocate(0x30)
        assert not source.close().complete
        assert not source.open()
        assert "enabled='state'" in caplog.text
        assert allocator.recording

    @pytest.mark.parametrize(
        "start",
        [
            lambda allocator: allocator.record(),
            lambda allocator: allocator.record(max_entries=100_000),
            lambda allocator: allocator.record(context=None),
            lambda allocator: allocator.record(context=None, clear_history=True),
        ],
        ids=["as torch does it", "bounded", "without stacks", "cleared"],
    )
    @pytest.mark.parametrize("end", ["close", "abandon"])
    def test_one_that_begins_inside_a_window_goes_on(
        self, allocator: FakeAllocator, start: Callable[[FakeAllocator], None], end: str
    ) -> None:
        """It is theirs from then on."""
        source = CudaEvents(0)
        assert source.open()
        allocator.allocate(0x30)
        start(allocator)
        allocator.allocate(0x40)
        allocator.free(0x30)
        getattr(source, end)()
        assert allocator.recording
        assert "stop" not in allocator.calls

    def test_one_that_ends_inside_a_window(self, allocator: FakeAllocator) -> None:
        """What is left of the window is not complete."""
        source = CudaEvents(0)
        assert source.open()
        allocator.allocate(0x30)
        allocator.record(None)
        assert not source.close().complete


class TestRefusals:
    """cudaMallocAsync and pluggable allocators refuse what the native one does."""

    @pytest.fixture
    def refusing(self, monkeypatch: pytest.MonkeyPatch, allocator: FakeAllocator) -> FakeAllocator:
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("cudaMallocAsync does not yet support this. If you need it, please file an issue")

        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", refuse)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", refuse)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
        monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", refuse)
        return allocator

    def test_no_window_and_one_line(self, refusing: FakeAllocator, caplog: pytest.LogCaptureFixture) -> None:
        """Steps are counted and never traced; nothing is raised."""
        source = CudaEvents(0)
        for _ in range(3):
            assert not source.open()
        assert len(warnings(caplog)) == 1
        assert "keeps no history" in caplog.text

    def test_recording_is_refused(self, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same where only recording is refused."""

        def refuse(**_: object) -> None:
            raise RuntimeError("does not yet support recordHistory")

        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", refuse)
        assert not CudaEvents(0).open()

    def test_listing_is_refused(self, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
        """What had begun is ended."""

        def refuse(**_: object) -> None:
            raise RuntimeError("does not yet support snapshot")

        monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
        source = CudaEvents(0)
        assert not source.open()
        assert not source.is_open
        assert not allocator.recording

    def test_counters_as_far_as_they_go(self, refusing: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
        """A counter that stays at 0 beside blocks in use is not known; without any there is no reading."""
        stats = {
            "allocated_bytes": {"all": {"current": 300, "peak": 400}},
            "reserved_bytes": {"all": {"current": 512}},
            "requested_bytes": {"all": {"current": 0, "peak": 0}},
            "allocation": {"all": {"current": 0, "allocated": 0}},
        }
        monkeypatch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", lambda _: stats)
        expected = AllocatorReading(allocated_bytes=300, reserved_bytes=512, peak_allocated_bytes=400)
        assert CudaEvents(0).reading() == expected

        def refuse(_: int) -> None:
            raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

        monkeypatch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", refuse)
        assert CudaEvents(0).reading() is None

    def test_torch_cannot_tell_who_records(self, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then nothing is recorded: a history of the user would be cleared."""
        monkeypatch.delattr(torch._C, "_cuda_isHistoryEnabled")
        assert not CudaEvents(0).open()
        assert allocator.calls == []


class TestWhatMayBeUsed:
    """Private pools, and a share of the device."""

    def test_private_pools_without_their_blocks_in_use(self, allocator: FakeAllocator) -> None:
        """What they hold beyond the blocks in use in them; they are listed when the counter has moved, not before."""
        pool = (0, 1)
        kept = {"device": 0, "total_size": 5000, "allocated_size": 1200, "segment_pool_id": pool, "blocks": []}
        source = CudaEvents(0)
        assert source.reading() == AllocatorReading(
            allocated_bytes=100,
            reserved_bytes=100,
            requested_bytes=100,
            peak_allocated_bytes=100,
            peak_requested_bytes=100,
            allocations=1,
            private_pool_bytes=0,
        )
        allocator.pools[pool] = [kept]
        allocator.pool_counters = {pool: {"all": {"current": 5000}}}
        listed: list[object] = []
        segments = allocator.segments

        def listing(mempool_id: tuple[int, int] | None = None, include_traces: bool = True) -> object:
            listed.append(mempool_id)
            return segments(mempool_id, include_traces)

        torch.cuda.memory_snapshot = listing
        for _ in range(3):
            reading = source.reading()
            assert reading is not None
            assert reading.private_pool_bytes == 3800
        assert listed == [pool]
        allocator.pool_counters = {pool: {"all": {"current": 0}}}
        assert (reading := source.reading()) is not None
        assert reading.private_pool_bytes == 0

    def test_pools_in_older_versions(self, allocator: FakeAllocator) -> None:
        """Where torch does not count them, the list that a traced step makes tells."""
        allocator.pool_counters = None
        source = CudaEvents(0)
        assert (before := source.reading()) is not None
        assert before.private_pool_bytes is None
        allocator.pools[0, 1] = [
            {"device": 0, "total_size": 5000, "allocated_size": 0, "segment_pool_id": [0, 1], "blocks": []}
        ]
        assert source.open()
        source.close()
        assert (after := source.reading()) is not None
        assert after.private_pool_bytes == 5000

    def test_a_share_of_the_device(self, allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
        """`set_per_process_memory_fraction` bounds what may be reserved; the whole device is no bound."""

        class Properties:
            total_memory = 80_000

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
        shares = []
        for share in (1.0, 0.25):
            monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda _, share=share: share)
            reading = CudaEvents(0).reading()
            assert reading is not None
            shares.append(reading.allowed_bytes)
        assert shares == [None, 20_000]


def test_no_window_of_its_own_interrupts_another() -> None:
    """A history has many readers."""
    assert not CudaEvents(0).interrupted()


def test_the_observer_of_failures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception is then all that tells of a failure; nothing is raised."""

    def refuse(_: object) -> None:
        raise RuntimeError("cudaMallocAsync does not yet support attachOutOfMemoryObserver")

    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", refuse, raising=False)
    assert not recording_torch_private.attach_oom_observer(lambda *_: None)


@pytest.mark.needs("listings of one memory pool")
class TestReferences:
    """torch takes a reference from each number that listing segments is given: one that nobody else has is freed."""

    @pytest.fixture(autouse=True, params=["torch", "taking", "keeping"])
    def listing(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """torch's own where it has one (a build with CUDA), and both kinds that there are."""

        def answer(given: tuple[int, ...] | None) -> dict[str, Any]:
            for number in (given or ()) if request.param != "keeping" else ():
                ctypes.pythonapi.Py_DecRef(ctypes.py_object(number))
            return {"segments": []}

        asked = recording_torch_private._listing_takes_references
        if request.param != "torch" or not hasattr(torch._C, "_cuda_memorySnapshot"):
            monkeypatch.setattr(torch._C, "_cuda_memorySnapshot", answer, raising=False)
        asked.cache_clear()
        yield
        asked.cache_clear()

    def test_numbers_outlive_the_listing(self) -> None:
        """Those of a pool, which the allocator's counters make, and the booleans."""
        number = int("2" * 18)
        held = [number] * 3
        before, false = sys.getrefcount(number), sys.getrefcount(False)
        for _ in range(500):
            assert segments((number, number), empty_history=True) == []
            assert segments() == []
        after, false_after = sys.getrefcount(number), sys.getrefcount(False)
        held += [number] * max(0, before - after)  # before anything is freed that is not ours
        assert after >= before
        assert false_after > false - 400

"""The history of a real CUDA device. Runs where there is one: `python -m pytest -m gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from memtrace.sources import torch_private
from memtrace.sources.cuda import CudaEvents
from memtrace.sources.events import Window

pytestmark = pytest.mark.gpu

SIZE = 12345


@pytest.fixture
def source() -> Iterator[CudaEvents]:
    torch.cuda.init()
    gc.collect()
    torch.cuda.synchronize()
    source = CudaEvents(torch.cuda.current_device())
    yield source
    source.abandon()
    torch_private.stop_memory_history()


def block(nbytes: int = SIZE) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def changes(window: Window, nbytes: int = SIZE) -> list[int]:
    return [1 if event.delta > 0 else -1 for event in window.events if abs(event.delta) == nbytes]


def requested(source: CudaEvents) -> int:
    reading = source.reading()
    assert reading is not None
    assert reading.requested_bytes is not None
    return reading.requested_bytes


def test_allocations_and_frees_with_their_addresses(source: CudaEvents) -> None:
    """Sizes as they were asked for, not as they were rounded."""
    assert source.open()
    tensor = block()
    address = tensor.untyped_storage().data_ptr()
    del tensor
    window = source.close()
    assert window.complete
    seen = [(event.address, event.delta) for event in window.events if abs(event.delta) == SIZE]
    assert seen == [(address, SIZE), (address, -SIZE)]
    assert all(window.begin_ns - 1000 <= event.time_ns <= window.end_ns for event in window.events)


def test_the_events_add_up_to_the_allocators_counter(source: CudaEvents) -> None:
    """What was live at the beginning, and every change since."""
    kept = [block(100), block(1 << 21)]
    assert source.open()
    before = requested(source)
    kept += [block(3 << 20), block(7)]
    del kept[0]
    after = requested(source)
    window = source.close()
    assert window.complete
    assert window.live_at_begin is not None
    assert sum(live.nbytes for live in window.live_at_begin) == before
    assert before + sum(event.delta for event in window.events) == after


def test_a_block_from_before_the_window_is_freed_in_it(source: CudaEvents) -> None:
    """It is in the list, and its free is an event."""
    tensor = block()
    assert source.open()
    del tensor
    window = source.close()
    assert window.complete
    assert SIZE in {live.nbytes for live in window.live_at_begin or ()}
    assert changes(window) == [-1]


def test_a_ring_that_is_too_small_is_noticed(source: CudaEvents) -> None:
    """Lost events make the window incomplete."""
    small = CudaEvents(torch.cuda.current_device(), max_events=4)
    assert small.open()
    kept = [block() for _ in range(20)]
    assert not small.close().complete
    del kept


def test_a_block_that_another_stream_uses_is_live_until_it_is_done(source: CudaEvents) -> None:
    """A requested free is not a completed one."""
    side = torch.cuda.Stream()
    tensor = block(1 << 20)
    assert source.open()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        tensor.add_(1)
    tensor.record_stream(side)
    del tensor
    window = source.close()
    assert window.complete
    assert changes(window, 1 << 20) == []
    side.synchronize()


def test_two_windows_one_after_the_other(source: CudaEvents) -> None:
    """The second begins with what the first has left."""
    assert source.open()
    kept = block()
    assert changes(source.close()) == [1]
    assert source.open()
    window = source.close()
    assert window.complete
    assert changes(window) == []
    assert SIZE in {live.nbytes for live in window.live_at_begin or ()}
    del kept


def test_a_history_of_the_user_goes_on(source: CudaEvents) -> None:
    """It is neither stopped nor cleared, and what the source reads of it is its own window."""
    torch.cuda.memory._record_memory_history(max_entries=10_000)
    early = block(SIZE + 1)
    assert source.open()
    late = block()
    window = source.close()
    assert window.complete
    assert changes(window) == [1]
    assert changes(window, SIZE + 1) == []
    assert torch_private.memory_history_is_recording()
    history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    assert SIZE + 1 in {entry["size"] for entry in history if entry["action"] == "alloc"}
    del early, late


def test_nothing_is_recorded_when_the_window_is_closed(source: CudaEvents) -> None:
    """After closing and after abandoning."""
    for end in (source.close, source.abandon):
        assert source.open()
        assert torch_private.memory_history_is_recording()
        end()
        assert torch_private.memory_history_is_recording() is False


def test_recording_takes_nothing_of_the_device_and_does_not_wait_for_it(source: CudaEvents) -> None:
    """The counters are as before, and torch's check for synchronisation raises nothing."""
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            assert source.open()
            source.reading()
            source.close()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before

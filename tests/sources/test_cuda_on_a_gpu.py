"""The history of a real CUDA device. Runs where there is one: `python -m pytest -m gpu`."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from memtrace.sources import recording_torch_private
from memtrace.sources.cuda.allocator import allowed_bytes
from memtrace.sources.cuda.source import CudaEvents
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
    recording_torch_private.stop_memory_history()


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
    torch.cuda.reset_accumulated_memory_stats()  # so that the history is known to be short
    torch.cuda.memory._record_memory_history(context=None, max_entries=10_000)
    early = block(SIZE + 1)
    assert source.open()
    late = block()
    window = source.close()
    assert window.complete
    assert changes(window) == [1]
    assert changes(window, SIZE + 1) == []
    assert recording_torch_private.memory_history_is_recording()
    history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    assert SIZE + 1 in {entry["size"] for entry in history if entry["action"] == "alloc"}
    del early, late


def test_nothing_is_recorded_when_the_window_is_closed(source: CudaEvents) -> None:
    """After closing and after abandoning."""
    for end in (source.close, source.abandon):
        assert source.open()
        assert recording_torch_private.memory_history_is_recording()
        end()
        assert recording_torch_private.memory_history_is_recording() is False


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


def test_events_are_on_our_clock(source: CudaEvents) -> None:
    """By the marks at the beginning of the window: no event after it was made, none much before."""
    for pause in (0.0, 0.5):
        assert source.open()
        spans, kept = [], []
        for size in range(SIZE, SIZE + 20):
            before = time.time_ns()
            kept.append(block(size))
            spans.append((size, before, time.time_ns()))
            time.sleep(pause / 20)
        window = source.close()
        assert window.complete
        made = {event.delta: event.time_ns for event in window.events}
        assert all(made[size] <= after for size, _, after in spans)
        early = sorted(before - made[size] for size, before, _ in spans)
        assert early[len(early) // 2] <= window.resolution_ns
        del kept


def test_a_history_of_the_user_that_begins_inside_a_window_goes_on(source: CudaEvents) -> None:
    """With torch's defaults it has stacks: it is theirs from then on, and left alone."""
    assert source.open()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    kept = block()
    source.close()
    assert recording_torch_private.memory_history_is_recording()
    history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    assert SIZE in {entry["size"] for entry in history if entry["action"] == "alloc"}
    late = block(SIZE + 1)
    assert not source.open()
    assert recording_torch_private.memory_history_is_recording()
    del kept, late


@pytest.mark.parametrize("options", [{}, {"enabled": "state", "context": None}], ids=["stacks", "state"])
def test_a_history_of_the_user_that_is_no_use_is_left_alone(source: CudaEvents, options: dict[str, object]) -> None:
    """At most one window is opened in it, and it goes on."""
    torch.cuda.memory._record_memory_history(**options)
    kept = [block()]
    opened = 0
    for _ in range(5):
        if source.open():
            opened += 1
            kept.append(block())
            source.close()
    assert opened <= 1
    assert recording_torch_private.memory_history_is_recording()


def test_many_allocations_fit_a_ring_that_is_sized_for_them(source: CudaEvents) -> None:
    """What does not fit the smallest ring fits one that was told; the counter says how many there were."""
    before = source.reading()
    small = CudaEvents(torch.cuda.current_device(), max_events=2000)
    assert small.open()
    for _ in range(2000):
        del_me = block()
        del del_me
    assert not small.close().complete
    assert source.open(2000)
    for _ in range(2000):
        del_me = block()
        del del_me
    window = source.close()
    after = source.reading()
    assert window.complete
    assert len(window.events) >= 4000
    assert before is not None
    assert after is not None
    assert before.allocations is not None
    assert after.allocations is not None
    assert after.allocations - before.allocations >= 4000


def test_a_share_of_the_device_is_read(source: CudaEvents) -> None:
    """`set_per_process_memory_fraction`, where torch can tell it."""
    if not hasattr(torch.cuda.memory, "get_per_process_memory_fraction"):
        assert allowed_bytes(torch.cuda.current_device()) is None
        return
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        block()
        reading = source.reading()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        assert reading is not None
        assert reading.allowed_bytes is not None
        assert abs(reading.allowed_bytes - total / 4) < total / 100
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    reading = source.reading()
    assert reading is not None
    assert reading.allowed_bytes is None


def test_what_a_graph_holds_is_a_figure_of_its_own(source: CudaEvents) -> None:
    """A gibibyte that was freed within the capture is neither slack nor anybody's."""
    before = source.reading()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(2):
            big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            del big
    assert source.open()
    source.close()
    after = source.reading()
    assert before is not None
    assert after is not None
    assert (after.private_pool_bytes or 0) - (before.private_pool_bytes or 0) >= 1 << 30
    assert after.slack_bytes < before.slack_bytes + (64 << 20)
    graph.reset()


def test_an_allocator_without_a_history_is_attached_to() -> None:
    """cudaMallocAsync refuses history and observer: steps are counted, and memtrace is up."""
    script = """
import os
os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
import torch
from torch import nn
from memtrace import MemoryTracer, TracerConfig
assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
model = nn.Linear(8, 8).cuda()
optimizer = torch.optim.AdamW(model.parameters())
with MemoryTracer(model, optimizer, TracerConfig(port=None, step_log=False, oom_reports=0, strict=True)) as tracer:
    for _ in range(4):
        model(torch.ones(4, 8, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tracer.snapshot().up
    assert tracer.latest.step == 4 and not tracer.latest.traced
    assert tracer.latest.allocator.allocated_bytes > 0 and tracer.latest.allocator.requested_bytes is None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("keeps no history") == 1

"""A run on a CUDA device whose allocator is somebody's own (`torch.cuda.memory.CUDAPluggableAllocator`)."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import PluggableAllocator
from greedy_training import reports_in
from small_training import make, step

from memtrace import MemoryTracer
from memtrace.attribution import scan
from memtrace.sources.cuda.source import CudaEvents
from memtrace.sources.failures import FAILURES

GB = 10**9


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> PluggableAllocator:
    """In the place of a device's, of which the driver's library says nothing, as in some containers."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(scan, "device_of", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(FAILURES, "_observing", None)
    properties = SimpleNamespace(uuid="a", major=9, minor=0, total_memory=80 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50 * GB, 80 * GB))
    return PluggableAllocator().install(monkeypatch)


def test_what_it_refuses_is_not_known(allocator: PluggableAllocator) -> None:
    """No counters, no window; an annotation is not written."""
    source = CudaEvents(0)
    assert source.reading() is None
    assert not source.open()
    assert not source.user_records()
    assert {"getDeviceStats", "recordHistory"} <= set(allocator.refused)


def test_a_run_goes_on_without_its_counters(
    allocator: PluggableAllocator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Attached to the end, in steps that are counted; one line says that none is traced.

    What the device has is told by CUDA's runtime; what the allocator could still hand out of it, by nobody. A failure
    has a report.
    """
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "log_dir": tmp_path}
    with (
        caplog.at_level(logging.WARNING, logger="memtrace"),
        pytest.raises(torch.OutOfMemoryError),
        MemoryTracer(model, optimizer, allocator_recording=True, annotate_snapshots=True, **settings) as tracer,
    ):
        for _ in range(4):
            step(model, optimizer)
        state = tracer.snapshot()
        assert tracer.attached
        assert state.up
        assert state.totals.steps == 4
        assert state.totals.traced_steps == 0
        latest = state.latest
        assert latest is not None
        assert latest.allocator is None
        assert state.device is not None
        assert (state.device.total_bytes, state.device.free_bytes) == (80 * GB, 50 * GB)
        assert state.device.free_and_reserved_bytes is None
        assert state.headroom_bytes is None
        with model.register_forward_hook(fails):
            step(model, optimizer)
    assert [("keeps no history" in record.getMessage()) for record in caplog.records].count(True) == 1
    assert "fault of its own" not in caplog.text
    (report,) = reports_in(tmp_path)
    assert report.device == "cuda:0"


def fails(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

"""Which source answers for which device."""

from __future__ import annotations

import logging

import pytest
import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.cuda.source import CudaEvents
from memtrace.sources.event_source import event_source


def test_cuda_and_the_cpu() -> None:
    """Each has its own."""
    assert isinstance(event_source(torch.device("cuda", 0)), CudaEvents)
    assert isinstance(event_source(torch.device("cpu")), CpuEvents)


@pytest.mark.parametrize("kind", ["mps", "xpu", "privateuseone"])
def test_another_kind_of_device(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Never the CPU's events beside another device's addresses: no window, and one line that says so. An NPU is the
    third, until its library has named it."""
    source = event_source(torch.device(kind, 0))
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        assert [source.open(), source.open(1000)] == [False, False]
    assert not source.is_open
    assert source.reading() is None
    assert not source.interrupted()
    assert source.fits(10**9)
    source.abandon()
    assert [kind in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.needs("counters of every accelerator")
def test_counters_of_another_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch has them for every accelerator; of no other than its own, and None where they are empty or refused."""
    stats: dict[str, int] = {}
    asked: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda index: asked.append(index) or stats)
    source = event_source(torch.device("xpu", 1))
    assert source.reading() is None, "nothing was allocated yet"
    stats.update({
        "allocated_bytes.all.current": 600, "reserved_bytes.all.current": 1000, "requested_bytes.all.current": 590,
        "allocated_bytes.all.peak": 800, "requested_bytes.all.peak": 700, "num_ooms": 0, "allocation.all.allocated": 9,
    })  # fmt: skip
    assert source.reading() == AllocatorReading(
        allocated_bytes=600, reserved_bytes=1000, requested_bytes=590, peak_allocated_bytes=800,
        peak_requested_bytes=700, ooms=0, allocations=9,
    )  # fmt: skip
    assert set(asked) == {1}
    assert event_source(torch.device("mtia", 1)).reading() is None, "torch's accelerator is another one"

    def refuses(index: int) -> dict[str, int]:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "memory_stats", refuses)
    assert source.reading() is None

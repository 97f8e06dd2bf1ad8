"""Devices whose driver does not tell their memory: unified memory, WSL, containers."""

from __future__ import annotations

import logging

import pytest
import torch

from memtrace.errors import DeviceUnavailable
from memtrace.record.breakdown import DeviceReading
from memtrace.sources.devices.fresh_readings import refresh_of, with_memory_by_torch
from memtrace.sources.devices.host import refreshed
from memtrace.sources.devices.sampler import DeviceSampler

HOUR = 3600.0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CUDA's runtime with 700 of 1000 bytes free; the list is what the allocator has reserved, in turns."""
    reserved = [200, 200]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: reserved.append(reserved[0]) or reserved.pop(0))
    return reserved


class WithoutMemory:
    """A driver that tells all but the memory."""

    def read(self) -> DeviceReading:
        return DeviceReading(name="NVIDIA GB10", power_watts=40.0)

    def close(self) -> None: ...


def no_driver() -> WithoutMemory:
    raise DeviceUnavailable("libnvidia-ml.so.1 is not there")


@pytest.mark.parametrize("period", [0, HOUR])
@pytest.mark.parametrize(("driver", "name"), [(WithoutMemory, "NVIDIA GB10"), (no_driver, None)])
def test_the_runtime_tells_what_the_driver_does_not(
    runtime: list[int], caplog: pytest.LogCaptureFixture, driver: type, name: str | None, period: float
) -> None:
    """Total, free and what could still be allocated; said once at most, however often it is read."""
    sampler = DeviceSampler(driver, period_seconds=period, refresh=refresh_of(torch.device("cuda", 0)))
    with caplog.at_level(logging.INFO, "memtrace"):
        sampler.start()
        readings = [sampler.reading() for _ in range(5)]
        sampler.stop()
    for reading in readings:
        assert reading is not None
        assert (reading.total_bytes, reading.free_bytes, reading.used_bytes) == (1000, 700, 300)
        assert reading.free_and_reserved_bytes == 900
        assert reading.name == name
        assert reading.process_bytes is None
    assert len(caplog.records) == (driver is no_driver)


def test_what_does_not_belong_together_is_not_added(runtime: list[int]) -> None:
    """The allocator got memory from the device while the runtime was asked."""
    runtime[:] = [200, 300]
    reading = with_memory_by_torch(0, DeviceReading())
    assert (reading.free_bytes, reading.free_and_reserved_bytes) == (700, None)


def test_nothing_is_asked_where_the_driver_tells_or_cuda_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime is initialised by nobody but the training."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: pytest.fail("asked"))
    for known, begun in ((DeviceReading(total_bytes=5), True), (DeviceReading(), False)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda begun=begun: begun)
        assert with_memory_by_torch(0, known) == known


def test_a_runtime_that_refuses_leaves_the_fields_absent(runtime: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never 0 in their place."""

    def refuses(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuses)
    assert with_memory_by_torch(0, DeviceReading(name="x")) == DeviceReading(name="x")


def test_other_devices() -> None:
    """A CPU's reading is refreshed, that of MPS, XPU and NPU is not."""
    assert refresh_of(torch.device("cpu")) is refreshed
    assert [refresh_of(torch.device(kind)) for kind in ("mps", "xpu", "meta")] == [None] * 3

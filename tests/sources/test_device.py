"""Which reader answers for which torch device."""

import pytest
from stub_nvml import StubProcess

from memtrace.errors import DeviceUnavailable
from memtrace.sources.devices.host import CpuDevice
from memtrace.sources.devices.readers import open_device


def test_the_cpu() -> None:
    """The CPU is read from the operating system."""
    assert isinstance(open_device("cpu"), CpuDevice)


def test_a_cuda_device(stub_driver: StubProcess) -> None:
    """A CUDA device is read from the driver, by the UUID that torch gives."""
    stub_driver.says("device GPU-1111 Stub\ntotal 1000\n")
    total = stub_driver.run("""
        device = open_device("cuda", "1111")
        result = device.read().total_bytes
        device.close()
    """)
    assert total == 1000


def test_a_cuda_device_without_uuid() -> None:
    """Without a UUID no device is guessed."""
    with pytest.raises(DeviceUnavailable, match="has no UUID"):
        open_device("cuda")


def test_another_kind_of_device() -> None:
    """A kind of device that nobody answers for is named."""
    with pytest.raises(DeviceUnavailable, match="'xpu'"):
        open_device("xpu", "1111")

"""Which reader answers for a torch device: the driver for a CUDA device, the operating system for the CPU."""

from __future__ import annotations

from typing import Protocol

from memtrace.errors import DeviceUnavailable
from memtrace.record.breakdown import DeviceReading
from memtrace.sources.devices.host import CpuDevice
from memtrace.sources.devices.nvml import NvmlDevice


class DeviceReader(Protocol):
    """Something that can be asked about one device until it is closed."""

    def read(self) -> DeviceReading:
        """Returns what is known now; fields that nobody tells are None."""
        ...

    def close(self) -> None:
        """Gives back what reading holds; closing twice does nothing."""
        ...


def open_device(device_type: str, uuid: str | None = None) -> DeviceReader:
    """Returns the reader of a device, without asking torch.

    Args:
        device_type: `torch.device.type`, such as `cuda` or `cpu`.
        uuid: of a CUDA device, as `str(torch.cuda.get_device_properties(index).uuid)` or with its prefix.

    Raises:
        DeviceUnavailable: nobody can be asked about that device.
    """
    if device_type == "cpu":
        return CpuDevice()
    if device_type != "cuda":
        raise DeviceUnavailable(f"there are no readings for a device of type {device_type!r}, only for cuda and cpu")
    if not uuid:
        raise DeviceUnavailable("the CUDA device has no UUID, and the driver's own numbering is not torch's")
    return NvmlDevice(uuid)

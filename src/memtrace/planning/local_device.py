"""The GPU of this machine, asked through the driver: no CUDA context is made and torch is not loaded."""

from __future__ import annotations

from collections.abc import Mapping

from memtrace.errors import DeviceUnavailable, PlanError
from memtrace.sources.devices.nvml import device_uuids
from memtrace.sources.devices.readers import open_device


def local_device(environment: Mapping[str, str]) -> tuple[str, int]:
    """Returns name and usable bytes of the GPU that a process started here would call `cuda:0`.

    Usable is the total less what the driver keeps for itself, whoever uses it now.

    Args:
        environment: variables of the process. CUDA_VISIBLE_DEVICES is understood as UUIDs or as numbers in the order
            of the PCI bus, which is CUDA's own order where all GPUs are alike.

    Raises:
        PlanError: there is no such GPU, or its driver does not tell its size.
    """
    try:
        reader = open_device("cuda", _first_visible(environment.get("CUDA_VISIBLE_DEVICES")))
    except DeviceUnavailable as error:
        raise PlanError(f"--device local needs a GPU with its driver: {error}") from error
    try:
        reading = reader.read()
    finally:
        reader.close()
    if reading.total_bytes is None:
        raise PlanError("--device local: the driver does not tell the size of the GPU; give --capacity instead")
    return reading.name or "local GPU", reading.total_bytes - (reading.driver_reserved_bytes or 0)


def _first_visible(visible: str | None) -> str:
    uuids = device_uuids()
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first.startswith("MIG-"):
        return first
    if first.startswith("GPU-"):  # CUDA takes the beginning of one that no other begins with
        named = [uuid for uuid in uuids if uuid.startswith(first)]
        return named[0] if len(named) == 1 else first
    if first.isdecimal() and int(first) < len(uuids):
        return uuids[int(first)]
    raise PlanError(
        f"--device local needs a visible GPU; the driver lists {len(uuids)}, CUDA_VISIBLE_DEVICES is {visible!r}"
    )

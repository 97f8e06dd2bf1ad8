"""What the NVIDIA driver says about one device: the only import of pynvml.

The binding is the distribution `nvidia-ml-py`; nothing here asks torch, so that a thread of its own can read while the
training thread works. What the driver refuses (not supported, no permission, N/A, device lost) is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

from memtrace.errors import DeviceUnavailable
from memtrace.record.breakdown import DeviceReading

_NOT_AVAILABLE = frozenset({2**32 - 1, 2**64 - 1})
"""All bits set: what the driver writes into a field of either width where it has no value."""

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Target of /proc/self/ns/pid outside any container: PID_NS_INIT_INO in the kernel's nsfs.h."""


class NvmlDevice:
    """One GPU or MIG instance, read through the driver's library.

    Holds one count of the library's initialisation from construction to `close()`: the library counts, so other users
    of pynvml in this process neither lose theirs nor keep ours. A forked child that reads takes a count of its own and
    looks the device up again.

    Args:
        uuid: as torch gives it (no prefix), or with a `GPU-` or `MIG-` prefix, if need be the wrong one. Never an
            index: those depend on CUDA_VISIBLE_DEVICES.
        proc: where the process file system is mounted.

    Raises:
        DeviceUnavailable: no driver library, it cannot be initialised, or it does not know the device.
    """

    def __init__(self, uuid: str, *, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._closed = False
        self._session: _Session | None = _open_session(uuid)
        self._uuid = self._session.uuid

    def read(self) -> DeviceReading:
        """Returns what the driver says now; a dozen calls of its library, which may block when the driver hangs.

        Never raises for what the driver answers: fields it refuses are None, all but the names after the device is
        lost.
        """
        session = self._current_session()
        if session is None:
            return DeviceReading(uuid=self._uuid)
        handle = session.handle
        memory = _memory(handle)
        processes = _processes(handle, os.getpid(), self._proc)
        rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
        busy_percent = None if rates is None else _known(rates.gpu)
        milliwatts = _known(_ask(pynvml.nvmlDeviceGetPowerUsage, handle))
        celsius = _known(_ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU))
        return DeviceReading(
            name=session.name,
            uuid=self._uuid,
            total_bytes=memory.total,
            used_bytes=memory.used,
            free_bytes=memory.free,
            driver_reserved_bytes=memory.driver_reserved,
            process_bytes=processes.own,
            other_processes_bytes=processes.others,
            utilization_ratio=None if busy_percent is None else busy_percent / 100,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if celsius is None else float(celsius),
        )

    def close(self) -> None:
        """Gives the count back; closing twice does nothing.

        A forked child that has never read only forgets what it inherited: its copy of the library may be locked by a
        thread that the child does not have.
        """
        session, self._session, self._closed = self._session, None, True
        if session is not None and session.pid == os.getpid():
            _shutdown()

    def _current_session(self) -> _Session | None:
        """Returns the session of this process, a new one after a fork; None where it cannot be opened there."""
        assert not self._closed, "read() after close()"
        if self._session is not None and self._session.pid != os.getpid():
            self._session = None
            _shutdown()  # the count that the child inherited
        if self._session is None:
            with suppress(DeviceUnavailable):
                self._session = _open_session(self._uuid)
        return self._session


def device_uuids() -> tuple[str, ...]:
    """Returns the UUID of each GPU, in the driver's order, which is that of the PCI bus.

    Raises:
        DeviceUnavailable: no driver library, it cannot be initialised, or it does not answer.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DeviceUnavailable(f"the NVIDIA driver cannot be asked: {error}") from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(pynvml.nvmlDeviceGetUUID(handle) for handle in handles)
    except pynvml.NVMLError as error:
        raise DeviceUnavailable(f"the NVIDIA driver does not list its devices: {error}") from error
    finally:
        _shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """One count of the library's initialisation and the device found under it; valid in one process."""

    pid: int
    handle: Any
    uuid: str
    name: str | None


def _open_session(uuid: str) -> _Session:
    with ExitStack() as undo:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DeviceUnavailable(f"the NVIDIA driver cannot be asked: {error}") from error
        undo.callback(_shutdown)
        try:
            handle = _instance(_find(uuid))
            full_uuid = pynvml.nvmlDeviceGetUUID(handle)
        except pynvml.NVMLError as error:
            raise DeviceUnavailable(f"the NVIDIA driver does not give access to device {uuid}: {error}") from error
        name = _ask(pynvml.nvmlDeviceGetName, handle)
        undo.pop_all()
    return _Session(pid=os.getpid(), handle=handle, uuid=full_uuid, name=name)


def _shutdown() -> None:
    with suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


def _find(uuid: str) -> Any:
    """Returns the handle of the GPU or the MIG instance with this UUID, whichever of the two its prefix says.

    CUDA gives UUIDs without one: which it is was guessed, and that of a GPU comes from an older driver's instance, too.
    """
    first, second = "GPU-", "MIG-"
    if uuid.startswith(second):
        first, second = second, first
    bare = uuid.removeprefix(first)
    with suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
        return pynvml.nvmlDeviceGetHandleByUUID(f"{first}{bare}")
    return pynvml.nvmlDeviceGetHandleByUUID(f"{second}{bare}")


def _instance(handle: Any) -> Any:
    """Returns the handle itself, or for a GPU in MIG mode that of its only instance.

    A process runs on one instance and never on the whole of such a GPU, whose numbers would be those of all tenants.

    Raises:
        DeviceUnavailable: the GPU has no instance or several, and its UUID does not say which one is meant.
    """
    mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return handle
    slots = range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    answers = [_ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in slots]
    instances = [instance for instance in answers if instance is not None]
    if len(instances) != 1:
        raise DeviceUnavailable(
            f"the GPU is in MIG mode with {len(instances)} visible instances; expected the UUID of one (MIG-...)"
        )
    return instances[0]


class _Memory(NamedTuple):
    total: int | None = None
    free: int | None = None
    driver_reserved: int | None = None

    @property
    def used(self) -> int | None:
        """What is neither free nor reserved.

        The driver's own `used` includes the reserved part in version 1, does not in version 2 of most drivers, and
        NVIDIA's documentation of version 2 says both.
        """
        if self.total is None or self.free is None:
            return None
        return self.total - self.free - (self.driver_reserved or 0)


def _memory(handle: Any) -> _Memory:
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
        reserved = _known(info.reserved)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
        info, reserved = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle), None
    except pynvml.NVMLError:
        info = None
    if info is None or not _known(info.total):
        return _Memory()
    return _Memory(total=info.total, free=_known(info.free), driver_reserved=reserved)


class _ProcessBytes(NamedTuple):
    own: int | None = None
    others: int | None = None


def _processes(handle: Any, own_pid: int, proc: Path) -> _ProcessBytes:
    """Returns what this process and all others hold, each None unless the driver's list can be believed.

    In a container the driver lists either the host's pids, one of which may equal ours by chance (then some of the
    others do not exist here), or only the processes of the container, with 0 bytes each on some drivers
    (https://github.com/NVIDIA/open-gpu-kernel-modules/pull/614). So 0 is not believed anywhere: a process with a
    context holds some memory. And what others hold is told only outside containers.
    """
    computing = _listed(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if computing is None:
        return _ProcessBytes()
    contained = not _in_first_pid_namespace(proc)
    if contained and not all((proc / str(pid)).exists() for pid in computing):
        return _ProcessBytes()
    own = computing.get(own_pid)
    drawing = _listed(pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle, unsupported={})
    if own is None or contained or drawing is None:
        return _ProcessBytes(own=own)
    others = {pid: size for pid, size in (drawing | computing).items() if pid != own_pid}
    known = [size for size in others.values() if size is not None]
    return _ProcessBytes(own=own, others=sum(known) if len(known) == len(others) else None)


def _listed(
    call: Callable[[Any], Any], handle: Any, *, unsupported: dict[int, int | None] | None = None
) -> dict[int, int | None] | None:
    """Returns bytes by pid as one of the driver's lists has them; None where it does not show the list.

    `unsupported` is what it means that the device has no such list: one that cannot draw has nobody drawing.
    """
    try:
        return {process.pid: process.usedGpuMemory or None for process in call(handle)}
    except pynvml.NVMLError_NotSupported:
        return unsupported
    except pynvml.NVMLError:
        return None


def _in_first_pid_namespace(proc: Path) -> bool:
    with suppress(OSError):
        return str((proc / "self/ns/pid").readlink()) == _FIRST_PID_NAMESPACE
    return False


def _ask(call: Callable[..., Any], *args: Any) -> Any:
    """Returns the driver's answer, None where it refuses or fails."""
    try:
        return call(*args)
    except pynvml.NVMLError:
        return None


def _known(value: int | None) -> int | None:
    return None if value in _NOT_AVAILABLE else value

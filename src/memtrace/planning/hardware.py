"""Devices: how much of their memory a process can use, and what it needs before the first tensor.

Three sizes of one device differ: what is on the box (80 GB), what the driver reports (81,559 MiB on an H100), and what
CUDA hands out (79.11 GiB there): the driver keeps a part for itself. The last is what `torch.cuda.mem_get_info` calls
the total and an out-of-memory message the capacity; a plan is held against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from memtrace.errors import PlanError
from memtrace.planning.lookup import by_name
from memtrace.record.plan import ByteRange, Fit, Plan
from memtrace.record.units import GIB, MIB
from memtrace.sources.cuda import cublas

CONTEXT = ByteRange(low=256 * MIB, high=GIB)
"""What a process holds on a GPU beside torch's allocator: the CUDA context, loaded kernels, libraries.

Low: 256 MiB, a bare context on an RTX 3090 with torch 2.7 (invoke-ai/InvokeAI issue 9413); pytorch/pytorch pull request
86509 measured 287,047,680 bytes after a first convolution with lazy loading; 426 MiB on an RTX 6000 Ada with CUDA 13
(unslothai/unsloth-zoo pull request 1053). High: 1 GiB, above which pytorch/pytorch issue 107667 puts a process that
loads all kernels; NAIRR's resource guide names 300 MB to 1 GB for context and libraries."""

COMMUNICATOR = ByteRange(low=544 * MIB, high=1639 * MIB)
"""What NCCL adds for one group of ranks: 544 to 688 MB on four A100 (NVIDIA/nccl issue 964), about 1.6 GB in
NVIDIA/nccl issue 864. Outside torch's allocator, too."""

_MEMORY_SIZE = re.compile(r"-[0-9]+GB$")

SLACK_RATIO = 0.05
"""Share of what is allocated that the allocator may hold besides, at the upper end, where it was not simulated.

A choice, not a measurement: the error that is allowed to the simulated allocator. Fragmentation can cost more: over 30
% in extreme cases (Rajbhandari et al., "ZeRO", section 3.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of GPU."""

    name: str
    marketing: str
    """Its size as it is sold."""
    driver_mib: int
    """Its total as the driver (nvidia-smi, amd-smi) reports it, in MiB."""
    usable_gib: float
    """What a process can allocate, in GiB: the lowest capacity seen in out-of-memory messages of torch."""
    workspace_bytes: int
    """One of the workspaces that cuBLAS keeps; hipBLAS where the device is AMD's."""

    @property
    def usable_bytes(self) -> int:
        """What a process can allocate."""
        return int(self.usable_gib * GIB)


_MI300X_WORKSPACE = 128 * MIB
"""hipBLAS's on gfx942. Source: as `memtrace.sources.cuda.cublas`."""


def _device(*, name: str, marketing: str, driver_mib: int, usable_gib: float, capability: int) -> Device:
    """Returns a device of NVIDIA, by the major figure of its compute capability."""
    return Device(
        name=name,
        marketing=marketing,
        driver_mib=driver_mib,
        usable_gib=usable_gib,
        workspace_bytes=cublas.default_bytes(capability),
    )


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            _device(name="T4", marketing="16 GB", driver_mib=15360, usable_gib=14.56, capability=7),
            _device(name="V100-16GB", marketing="16 GB", driver_mib=16384, usable_gib=15.77, capability=7),
            _device(name="V100-32GB", marketing="32 GB", driver_mib=32768, usable_gib=31.73, capability=7),
            _device(name="A10", marketing="24 GB", driver_mib=23028, usable_gib=21.98, capability=8),
            _device(name="L4", marketing="24 GB", driver_mib=23034, usable_gib=21.96, capability=8),
            _device(name="L40S", marketing="48 GB", driver_mib=46068, usable_gib=44.34, capability=8),
            _device(name="RTX-3090", marketing="24 GB", driver_mib=24576, usable_gib=23.68, capability=8),
            _device(name="RTX-4090", marketing="24 GB", driver_mib=24564, usable_gib=23.61, capability=8),
            _device(name="RTX-5090", marketing="32 GB", driver_mib=32607, usable_gib=31.36, capability=12),
            _device(name="A100-40GB", marketing="40 GB", driver_mib=40960, usable_gib=39.38, capability=8),
            _device(name="A100-80GB", marketing="80 GB", driver_mib=81920, usable_gib=79.14, capability=8),
            _device(name="H100-80GB", marketing="80 GB", driver_mib=81559, usable_gib=79.10, capability=9),
            _device(name="H200-141GB", marketing="141 GB", driver_mib=143771, usable_gib=139.72, capability=9),
            _device(name="B200-180GB", marketing="180 GB", driver_mib=183359, usable_gib=178.35, capability=10),
            Device(
                name="MI300X-192GB",
                marketing="192 GB",
                driver_mib=196592,
                usable_gib=191.69,
                workspace_bytes=_MI300X_WORKSPACE,
            ),
        )
    }
)
"""Every device, by name.

Totals of the driver: modal-labs/modal-client pull request 2797 (T4, L4, A10, L40S, A100, H100); outputs of nvidia-smi
and amd-smi in public reports for the others. Usable: out-of-memory messages of torch in public reports, such as
hpcaitech/Open-Sora issue 697 and facebookresearch/tribev2 issue 28 (T4), liucongg/ChatGLM-Finetuning issue 73 (V100),
NVlabs/Eagle issue 68 (L40), vllm-project/vllm issue 16343 (RTX 3090), pinokiofactory/flux-webui issue 11 (RTX 4090),
TrajectoryCrafter issue 20 (RTX 5090), lianqi1008/Control-GIC issue 6 (A100-80GB), vllm-project/vllm issue 27508 (H100).
They differ by some 0.1 GiB with the driver and ECC; the lowest is here. A10 stands for the A10G, L40S for the L40.
"""


def find_device(name: str) -> Device:
    """Returns the device with this name, or with the only name that begins so, such as `H100`.

    Raises:
        PlanError: there is none; the message proposes the nearest, or names those that begin so.
    """
    starts = [known for known in DEVICES if known.casefold().startswith(name.casefold())]
    if len(starts) > 1 and name.casefold() not in (known.casefold() for known in starts):
        raise PlanError(f"device {name!r} could be any of {', '.join(starts)}: name one of them")
    return by_name("device", starts[0] if len(starts) == 1 else name, DEVICES)


def known_as(name: str) -> Device | None:
    """Returns the device with this name, or the first that a driver calls so, such as `NVIDIA H200`; None for others.

    Of those that differ in nothing but the size of their memory it may be the wrong one.
    """
    for device in DEVICES.values():
        kind = _MEMORY_SIZE.sub("", device.name).replace("-", " ")
        if name == device.name or re.search(rf"\b{kind}\b", name):
            return device
    return None


def held_against(plan: Plan, device: str, capacity_bytes: int, world_size: int) -> Plan:
    """Returns the plan with its verdict on a device.

    Args:
        plan: without one.
        device: its name.
        capacity_bytes: what a process can use of it.
        world_size: ranks of the run; more than one need a communicator.
    """
    if plan.reserved_bytes is not None:
        held = ByteRange(low=plan.allocated.low, high=int(plan.reserved_bytes * (1 + plan.reserved_margin)))
    elif plan.allocated.high is not None:
        held = ByteRange(low=plan.allocated.low, high=int(plan.allocated.high * (1 + SLACK_RATIO)))
    else:
        held = plan.allocated
    beside = CONTEXT if world_size == 1 else CONTEXT + COMMUNICATOR
    return replace(plan, fit=Fit(device=device, capacity_bytes=capacity_bytes, needed=held + beside))

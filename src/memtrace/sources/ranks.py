"""Which process of which run this is, read from torch.distributed or from the launcher's environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from memtrace.snapshot import RunIdentity


def identify(device: torch.device, run_name: str | None) -> RunIdentity:
    """Returns rank, local rank and world size, the device and its UUID. Issues no collective."""
    rank, world_size = _env("RANK", 0), _env("WORLD_SIZE", 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return RunIdentity(
        run_name=run_name or script_name(),
        rank=rank,
        local_rank=_env("LOCAL_RANK", 0),
        world_size=world_size,
        device=str(device),
        gpu_uuid=gpu_uuid(device),
    )


def gpu_uuid(device: torch.device) -> str | None:
    """Returns the device's UUID as the driver writes it; None for a CPU or where torch does not know it."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return None
    text = str(uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"


def script_name() -> str:
    """Returns the name of the running script without its ending; `run` in an interactive session."""
    return Path(sys.argv[0]).stem or "run" if sys.argv and sys.argv[0] not in ("", "-c", "-m") else "run"


def _env(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default

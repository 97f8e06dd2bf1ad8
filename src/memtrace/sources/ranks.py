"""Which process of which run this is, read from torch.distributed or from the launcher's environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from memtrace.guard import ask
from memtrace.record.process import Process
from memtrace.record.snapshot import RunIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which process of a run one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes on the same machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The variables in which a launcher tells each process which one it is."""

    rank: str
    world_size: str
    local_rank: str
    set_in_shells: bool = False
    """Whether a shell that nothing was launched from yet has them too, as rank 0 of what may be launched."""


LAUNCHERS = (
    Launcher(rank="RANK", world_size="WORLD_SIZE", local_rank="LOCAL_RANK"),  # torchrun, accelerate, deepspeed
    Launcher(  # mpirun of Open MPI
        rank="OMPI_COMM_WORLD_RANK", world_size="OMPI_COMM_WORLD_SIZE", local_rank="OMPI_COMM_WORLD_LOCAL_RANK"
    ),
    Launcher(  # of MVAPICH
        rank="MV2_COMM_WORLD_RANK", world_size="MV2_COMM_WORLD_SIZE", local_rank="MV2_COMM_WORLD_LOCAL_RANK"
    ),
    Launcher(rank="PMI_RANK", world_size="PMI_SIZE", local_rank="MPI_LOCALRANKID"),  # of MPICH and Intel MPI
    Launcher(rank="SLURM_PROCID", world_size="SLURM_STEP_NUM_TASKS", local_rank="SLURM_LOCALID"),  # srun
    Launcher(  # a batch job's or an interactive allocation's shell, with the number of tasks that was asked for
        rank="SLURM_PROCID", world_size="SLURM_NTASKS", local_rank="SLURM_LOCALID", set_in_shells=True
    ),
)
"""The first one that tells a place is believed: those further down may have started the launcher above them."""


_MOST_WRAPPERS = 4
"""What is taken off a model at most, such as DistributedDataParallel and an engine around it."""
_NO_STEP = 2**32 - 16
"""From here on Slurm's step numbers are of batch scripts and interactive shells, which launch more than once."""


def identify(
    device: torch.device, run_name: str | None, run_id: str | None = None, model: object = None
) -> RunIdentity:
    """Returns rank, local rank and world size, the device and its UUID, launch and model. Issues no collective."""
    place = launched_as(os.environ)
    rank, world_size = place.rank, place.world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return RunIdentity(
        run_name=run_name or script_name(),
        run_id=run_id or _this_launch(world_size),
        rank=rank,
        local_rank=place.local_rank,
        world_size=world_size,
        device=str(device),
        gpu_uuid=gpu_uuid(device),
        model="" if model is None else ask(_model_name, model) or type(model).__name__,
    )


def _model_name(model: object) -> str:
    """Returns the class of a model without what wraps it, and the name or path that its configuration has."""
    for _ in range(_MOST_WRAPPERS):
        inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            break
        model = inner
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", None)
    kind = type(model).__name__
    return f"{kind} {loaded_from}" if isinstance(loaded_from, str) and loaded_from else kind


def _this_launch(world_size: int) -> str:
    """Returns the id of this launch; in a notebook each execution of a cell is one."""
    launch = launch_id(os.environ, Process.of(os.getpid() if world_size == 1 else os.getppid()))
    shell = _shell()
    return launch if shell is None else f"{launch}-cell{shell.execution_count}"


def launched_as(environment: Mapping[str, str]) -> Place:
    """Returns the place that the launcher's variables tell; that of a process alone where none does."""
    local_ranks = (_number(environment, launcher.local_rank) for launcher in LAUNCHERS)
    local_rank = next((found for found in local_ranks if found is not None), 0)
    for launcher in LAUNCHERS:
        rank, world_size = _number(environment, launcher.rank), _number(environment, launcher.world_size)
        if rank is None or world_size is None or rank >= world_size or (launcher.set_in_shells and rank == 0):
            continue
        return Place(rank=rank, world_size=world_size, local_rank=local_rank)
    return Place(local_rank=local_rank)


def launch_id(environment: Mapping[str, str], launcher: Process) -> str:
    """Returns what all ranks of one launch have in common, and no other launch.

    That is the id of the launcher: of torchrun, unless nobody gave it one, of a step of Slurm, of PMIx; else when,
    where and as which process the launch began. Each restart of the same launch has its number added.

    Args:
        environment: the variables of the process.
        launcher: what began the launch on this machine: the process itself where it is alone. Without an id of the
            launcher, several machines have one each.
    """
    elastic, namespace = environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("PMIX_NAMESPACE", "")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    if elastic not in ("", "none"):
        found = elastic
    elif job is not None and step is not None and step < _NO_STEP:
        found = f"slurm-{job}.{step}"
    elif namespace:
        found = namespace
    else:
        start = datetime.fromtimestamp(launcher.start_unix_seconds, UTC)
        found = f"{start:%Y%m%dT%H%M%SZ}-{launcher.host}-{launcher.pid}"
    restarts = [_number(environment, name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return "-restart".join([found, *(str(count) for count in restarts if count)])


def gpu_uuid(device: torch.device) -> str | None:
    """Returns the device's UUID as the driver writes it; None for a CPU or where torch does not know it.

    That of a MIG instance is told by the device's name, as in `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    if uuid is None:
        return None
    text = str(uuid)
    kind = "MIG" if " MIG " in str(getattr(properties, "name", "")) else "GPU"
    return text if text.startswith(("GPU-", "MIG-")) else f"{kind}-{text}"


def script_name() -> str:
    """Returns the name of the running script without its ending; `run` in an interactive session.

    In a notebook it is the notebook's name, `notebook` where nobody tells it, with the number of the cell's execution,
    as in `[12]`: a cell that is run again has a run of its own.
    """
    script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] not in ("", "-c", "-m") else ""
    shell = _shell()
    if shell is None:
        return script or "run"
    name = _notebook_name() if script in _KERNELS else script
    return f"{name}-{shell.execution_count}"


_KERNELS = frozenset({"", "ipykernel_launcher", "colab_kernel_launcher", "__main__", "ipython", "ipython3"})
"""Scripts that are no script of the user's: what starts a kernel or a shell."""


def _shell() -> Any:
    """Returns IPython's shell, in which cells run; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ask(getattr(ipython, "get_ipython", lambda: None))
    return shell if isinstance(getattr(shell, "execution_count", None), int) else None


def _notebook_name() -> str:
    """Returns the name of the notebook as Jupyter or VS Code tell it, else `notebook`."""
    told = getattr(sys.modules.get("__main__"), "__vsc_ipynb_file__", None) or os.environ.get("JPY_SESSION_NAME", "")
    path = Path(str(told))
    return path.stem if path.suffix == ".ipynb" else "notebook"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None

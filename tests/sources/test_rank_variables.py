"""Which process of a run this is, by the variables of its launcher."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memtrace.record.process import Process
from memtrace.sources.ranks import LAUNCHERS, Place, identify, launch_id, launched_as

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
SRUN_WITH_PMI = {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "8"}
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
PLACED = (TORCHRUN, OPEN_MPI, MVAPICH, MPICH, SRUN, SRUN_WITH_PMI, TASK)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in LAUNCHERS:
        for name in (launcher.rank, launcher.world_size, launcher.local_rank):
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", PLACED, ids=lambda environment: next(iter(environment)))
def test_each_launcher_is_understood(environment: dict[str, str]) -> None:
    """torchrun, the mpirun of three libraries, and srun, with and without its PMI."""
    assert launched_as(environment) == Place(rank=3, world_size=8, local_rank=1)


def test_no_launcher_is_a_process_alone() -> None:
    """Without variables: rank 0 of 1."""
    assert launched_as({}) == Place()


def test_torchrun_within_srun_is_believed() -> None:
    """One srun task a machine starts torchrun, whose processes have variables of both."""
    assert launched_as({**SRUN, "RANK": "13", "WORLD_SIZE": "64", "LOCAL_RANK": "5"}) == Place(
        rank=13, world_size=64, local_rank=5
    )


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_shell_of_a_batch_job_is_a_process_alone(tasks: str) -> None:
    """A script that sbatch or salloc runs has the variables of rank 0 although srun has started nothing."""
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": tasks, "SLURM_JOB_ID": "7"}
    assert launched_as(shell) == Place()


def test_first_task_of_srun_is_not_alone() -> None:
    """srun tells its tasks how many they are."""
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
    assert launched_as(task) == Place(world_size=4)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_what_is_no_rank_of_a_world_is_passed_over(environment: dict[str, str]) -> None:
    """Variables that say nothing sensible do not hide those of the launcher above."""
    assert launched_as(environment) == Place()
    assert launched_as({**SRUN, **environment}) == Place(rank=3, world_size=8, local_rank=1)


@pytest.mark.usefixtures("no_launcher")
def test_identity_has_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics' labels, the ports and the names of files follow from it."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    found = identify(torch.device("cpu"), "run")
    assert (found.rank, found.world_size, found.local_rank) == (3, 8, 1)


@pytest.mark.usefixtures("no_launcher")
def test_process_group_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.distributed says stands before the variables; the local rank is the launcher's."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        found = identify(torch.device("cpu"), "run")
    finally:
        torch.distributed.destroy_process_group()
    assert (found.rank, found.world_size, found.local_rank) == (0, 1, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "20010909T014640Z-node-12"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "20010909T014640Z-node-12"),
        ({"TORCHELASTIC_RUN_ID": "job", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, "job"),
        ({"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2"}, "job-restart2"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "0"}, "slurm-7.1"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967291"}, "20010909T014640Z-node-12"),
        ({"PMIX_NAMESPACE": "prterun-node-3@1"}, "prterun-node-3@1"),
    ],
)
def test_a_launch_has_an_id(environment: dict[str, str], expected: str) -> None:
    """The launcher's where it gives one that no other launch has, else its start."""
    assert launch_id(environment, Process(host="node", pid=12, start_unix_seconds=1_000_000_000.0)) == expected


@pytest.mark.parametrize(
    ("name", "uuid", "expected"),
    [
        ("NVIDIA H200", "11111111-2222", "GPU-11111111-2222"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "11111111-2222", "MIG-11111111-2222"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-11111111-2222", "MIG-11111111-2222"),
        ("NVIDIA H200", None, None),
    ],
)
def test_a_device_has_the_uuid_that_the_driver_writes(
    monkeypatch: pytest.MonkeyPatch, name: str, uuid: str | None, expected: str | None
) -> None:
    """CUDA leaves out whether it is a GPU's or an instance's; of a device by its number, which is not the driver's."""
    asked: list[torch.device] = []
    properties = SimpleNamespace(name=name, uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    device = torch.device("cuda", 3)
    assert identify(device, "run").gpu_uuid == expected
    assert asked == [device]

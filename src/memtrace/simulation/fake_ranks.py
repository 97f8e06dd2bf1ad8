"""A process group of ranks that are not there: collectives return at once and move nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # the only home of torch's "fake" backend

from memtrace.errors import PlanError


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process rank `rank` of `world_size` for as long as the context lasts.

    Raises:
        PlanError: the process has a process group of its own.
    """
    if dist.is_initialized():
        raise PlanError("a sharded plan needs a process without a process group: plan before init_process_group")
    dist.init_process_group(backend="fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_fsdp() -> None:
    """Checks that FSDP2 of the installed torch runs without a GPU.

    Raises:
        PlanError: it does not: in torch 2.6 what stands for a stream of the CPU cannot do what FSDP2 asks of one.
    """
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise PlanError(
            f"a simulated plan under FSDP2 needs a newer torch: FSDP2 of {torch.__version__} does not run without a "
            "GPU; give --params instead of --config, or plan with torch 2.8"
        )

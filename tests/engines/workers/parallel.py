"""Trains with what splits layers, stages, state or gradients over two ranks, from before the model is built."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from all_threads import AllThreadsEvents
from report import STEPS, checksum, traced_records, write_report
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH, ROWS, CHUNKS = 128, 4, 4
Step = Callable[[torch.Tensor], float]


def block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(rows: torch.Tensor) -> float:
        loss = model(rows).square().mean()
        loss.backward()
        found = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        result = found.item()
        del loss, found
        optimizer.step()
        optimizer.zero_grad()
        return result

    return step


def tensors() -> tuple[nn.Module, Any, Step]:
    """Matrices in columns and rows."""
    model = parallelize_module(block(), mesh(), {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimizer = adam(model)
    return model, optimizer, plainly(model, optimizer)


def sequence() -> tuple[nn.Module, Any, Step]:
    """The norm and the output for a part of the rows on each rank."""
    plan = {
        "0": SequenceParallel(sequence_dim=0),
        "1": ColwiseParallel(input_layouts=Shard(0)),
        "3": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    model = parallelize_module(block(), mesh(), plan)
    optimizer = adam(model)
    return model, optimizer, plainly(model, optimizer)


def stages() -> tuple[nn.Module, Any, Step]:
    """A stage on each rank, micro batches in turns forward and backward."""
    model = [block(), block()][dist.get_rank()]
    stage = PipelineStage(model, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    schedule = Schedule1F1B(stage, CHUNKS, loss_fn=lambda output, target: (output - target).square().mean())
    optimizer = adam(model)

    def step(rows: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        if dist.get_rank() == 0:
            schedule.step(rows)
        else:
            schedule.step(target=rows, losses=losses)
        result = sum(loss.item() for loss in losses)
        losses.clear()
        optimizer.step()
        optimizer.zero_grad()
        return result

    return model, optimizer, step


def state() -> tuple[nn.Module, Any, Step]:
    """torch's own sharded optimizer under DDP."""
    model = DistributedDataParallel(nn.Sequential(block(), block()))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    return model, optimizer, plainly(model, optimizer)


def compressed() -> tuple[nn.Module, Any, Step]:
    """DDP whose gradients travel as products of small matrices; what this loses is kept for the next step.

    In one bucket: with gloo the hooks of two wait for each other for ever.
    """
    model = DistributedDataParallel(block())
    hooked = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(hooked, powerSGD_hook.powerSGD_hook)
    optimizer = adam(model)
    return model, optimizer, plainly(model, optimizer)


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


VARIANTS = {made.__name__: made for made in (tensors, sequence, stages, state, compressed)}


def steps(step: Step, losses: list[float]) -> Iterator[None]:
    """Trains; yields before the first step and after each one."""
    numbers = torch.Generator().manual_seed(1)
    yield
    for _ in range(STEPS):
        losses.append(step(torch.randn(ROWS, WIDTH, generator=numbers)))
        yield


def run(make: Callable[[], tuple[nn.Module, Any, Step]]) -> dict[str, Any]:
    plain_losses: list[float] = []
    torch.manual_seed(0)
    plain, _, step = make()
    for _ in steps(step, plain_losses):
        pass
    source = AllThreadsEvents()
    source.open()
    torch.manual_seed(0)
    model, optimizer, step = make()
    losses: list[float] = []
    records = traced_records(model, optimizer, source, steps(step, losses))
    return {
        "records": records,
        "losses": losses,
        "plain_losses": plain_losses,
        "same_weights": checksum(model) == checksum(plain),
    }


def main() -> None:
    dist.init_process_group("gloo")
    gc.freeze()
    write_report({name: run(make) for name, make in VARIANTS.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

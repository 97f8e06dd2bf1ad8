"""Trains with FSDP1, FSDP2 and DDP under memtrace, from before the model is built."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from all_threads import AllThreadsEvents
from fsdp_on_a_cpu import let_fsdp_train
from model import batch, build_model
from report import MICRO_BATCHES, STEPS, checksum, peak_without_memtrace, traced_records, write_report
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from memtrace.attribution.engines import find_engines
from memtrace.config import TracerConfig
from memtrace.tracing.tracer import Tracer

let_fsdp_train()

UPDATED = (True, False, False, True, False, True)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FSDP: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp-keep": {"reshard_after_forward": False},
    "fsdp-bf16": {"mp_policy": BF16},
    "fsdp-bf16-keep": {"mp_policy": BF16, "reshard_after_forward": False},
    "fsdp-bf16-offload": {"mp_policy": BF16, "offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "fsdp-in-backward": {},
}
IN_BACKWARD = "fsdp-in-backward"
"""Trained by one optimizer for each parameter, which drops its gradient inside the backward pass."""
LEFT_OUT = ("ddp", "ddp-view", "fsdp", "fsdp-bf16")
"""Trained for some steps more, without telling them, in which the loop leaves out updates."""
FLAT_BF16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FSDP1: dict[str, dict[str, Any]] = {
    "fsdp1": {},
    "fsdp1-bf16": {"mixed_precision": FLAT_BF16, "use_orig_params": True},
    "fsdp1-bf16-keep": {"mixed_precision": FLAT_BF16, "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
}
DDP: dict[str, dict[str, Any]] = {
    "ddp": {"bucket_cap_mb": 0.05},
    "ddp-view": {"bucket_cap_mb": 0.05, "gradient_as_bucket_view": True},
}


def build(name: str) -> nn.Module:
    model = build_model()
    if name in DDP:
        return DistributedDataParallel(model, **DDP[name])
    if name in FSDP1:
        settings = {"device_id": torch.device("cpu"), **FSDP1[name]}
        layers = model.bert.encoder.layer
        for position, layer in enumerate(layers):
            layers[position] = FullyShardedDataParallel(layer, **settings)
        return FullyShardedDataParallel(model, **settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, **FSDP[name])
    return fully_shard(model, mesh=mesh, **FSDP[name])


def optimizer_of(name: str, model: nn.Module) -> Any:
    if name != IN_BACKWARD:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    one_each = {parameter: torch.optim.AdamW([parameter], lr=1e-3) for parameter in model.parameters()}

    def update(parameter: nn.Parameter) -> None:
        one_each[parameter].step()
        one_each[parameter].zero_grad()

    for parameter in one_each:
        parameter.register_post_accumulate_grad_hook(update)
    return one_each


def steps(model: nn.Module, optimizer: Any, losses: list[float]) -> Iterator[None]:
    """Trains; yields before the first step and after each one."""
    yield
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            last = micro == MICRO_BATCHES - 1
            # DDP reduces with the last micro batch only.
            waiting = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else None
            with waiting or contextlib.nullcontext():
                loss = model(**batch(dist.get_rank(), step * MICRO_BATCHES + micro)).loss
                loss.backward()
            losses.append(loss.item())
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step()
            optimizer.zero_grad()
        yield


def counted(model: nn.Module, optimizer: torch.optim.Optimizer, updated: tuple[bool, ...]) -> int:
    """Returns how many steps a tracer counts that nobody tells; where one is not updated its gradients are dropped."""
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0, step_log=False)
    with Tracer(model, optimizer, config) as tracer:
        for number, is_updated in enumerate(updated):
            model(**batch(dist.get_rank(), number)).loss.backward()
            if is_updated:
                optimizer.step()
            optimizer.zero_grad()
        return tracer.snapshot().totals.steps


def run(name: str) -> dict[str, Any]:
    plain_losses: list[float] = []
    plain: list[nn.Module] = []

    def train_plain() -> Iterator[None]:
        plain.append(build(name))
        yield from steps(plain[0], optimizer_of(name, plain[0]), plain_losses)

    numels = [parameter.numel() for parameter in build_model().parameters()]
    plain_peak = peak_without_memtrace(train_plain, step=2)
    source = AllThreadsEvents()
    source.open()
    model = build(name)
    optimizer = optimizer_of(name, model)
    losses: list[float] = []
    records = traced_records(model, optimizer, source, steps(model, optimizer, losses))
    same_weights = checksum(model) == checksum(plain[0])
    return {
        "engines": [engine.name for engine in find_engines(model, [optimizer])],
        "steps_counted": counted(model, optimizer, UPDATED) if name in LEFT_OUT else None,
        "numels": numels,
        "names": [name for name, _ in build_model().named_parameters()],
        "shapes": [list(parameter.shape) for parameter in build_model().parameters()],
        "records": records,
        "losses": losses,
        "plain_losses": plain_losses,
        "plain_peak": plain_peak,
        "same_weights": same_weights,
    }


def main() -> None:
    dist.init_process_group("gloo")
    gc.freeze()  # the engines ask for collections: what imports have made is left out of them
    write_report({name: run(name) for name in os.environ["VARIANTS"].split(",")})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Trains with each stage of DeepSpeed ZeRO under memtrace, from before the model is built."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch.distributed as dist
from all_threads import AllThreadsEvents
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from model import batch, build_lora, build_model, build_qlora
from report import MICRO_BATCHES, STEPS, checksum, peak_without_memtrace, traced_records, write_report

BUCKET_ELEMENTS = 20_000
VARIANTS: dict[str, dict[str, Any]] = {
    "zero-0": {"stage": 0},
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2},
    "zero-2-overlap": {"stage": 2, "overlap_comm": True},
    "zero-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero-3-overlap": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
    "zero-3-persistent": {"stage": 3, "stage3_param_persistence_threshold": 100},
    "zero-3-streaming": {
        "stage": 3,
        "stage3_param_persistence_threshold": 50,
        "stage3_prefetch_bucket_size": 5_000,
        "stage3_max_live_parameters": 20_000,
        "stage3_max_reuse_distance": 5_000,
        "sub_group_size": 10_000,
    },
    "zero-2-one-bucket": {"stage": 2, "reduce_bucket_size": 500_000},
    "zero-2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero-2-lora": {"stage": 2, "lora": True},
    "zero-3-lora": {"stage": 3, "lora": True, "stage3_param_persistence_threshold": 0},
    "zero-2-qlora": {"stage": 2, "lora": "4 bits"},
    "zero-3-qlora": {"stage": 3, "lora": "4 bits", "stage3_param_persistence_threshold": 0},
    "zero-3-offload": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


BUILDERS = {None: build_model, True: build_lora, "4 bits": build_qlora}


def initialize(zero: dict[str, Any]) -> Any:
    model = BUILDERS[zero.get("lora")]()
    zero = {name: value for name, value in zero.items() if name != "lora"}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "bf16": {"enabled": True},
        "zero_optimization": {"contiguous_gradients": True, "reduce_bucket_size": BUCKET_ELEMENTS, **zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own for offloaded states would be compiled first
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    return engine


def steps(engine: Any, losses: list[float]) -> Iterator[None]:
    """Trains; yields before the first step and after each one."""
    yield
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            loss = engine(**batch(dist.get_rank(), step * MICRO_BATCHES + micro)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        yield


def estimate(stage: int, numels: list[int]) -> int | None:
    """Returns the bytes a GPU that DeepSpeed's own estimators tell; there is none for ZeRO 0 and 1."""
    ranks = dist.get_world_size()
    if stage == 2:
        return estimate_zero2_model_states_mem_needs(sum(numels), ranks, cpu_offload=False)[1]
    if stage == 3:
        return estimate_zero3_model_states_mem_needs(
            sum(numels), max(numels), ranks, cpu_offload=False, cpu_offload_params=False
        )[1]
    return None


def run(zero: dict[str, Any]) -> dict[str, Any]:
    plain_losses: list[float] = []
    plain: list[Any] = []

    def train_plain() -> Iterator[None]:
        plain.append(initialize(zero))
        yield from steps(plain[0], plain_losses)

    numels = [parameter.numel() for parameter in BUILDERS[zero.get("lora")]().parameters()]
    plain_peak = peak_without_memtrace(train_plain, step=2)
    source = AllThreadsEvents()
    source.open()
    engine = initialize(zero)
    losses: list[float] = []
    records = traced_records(engine, engine.optimizer, source, steps(engine, losses))
    return {
        "numels": numels,
        "estimate": estimate(zero["stage"], numels),
        "records": records,
        "losses": losses,
        "plain_losses": plain_losses,
        "plain_peak": plain_peak,
        "same_weights": checksum(engine.module) == checksum(plain[0].module),
    }


def main() -> None:
    logging.disable(logging.WARNING)
    # Gloo alone: the shared-memory collectives would be compiled first, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    deepspeed.init_distributed(verbose=False)
    wanted = os.environ["VARIANTS"].split(",")
    gc.freeze()  # the engines ask for collections: what imports have made is left out of them
    write_report({name: run(VARIANTS[name]) for name in wanted})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Trains with Trainer and one engine after the other, without and with the callback; leaves logs and target files."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from fsdp_on_a_cpu import let_fsdp_train
from model import build_model
from report import checksum, write_report
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from memtrace import MemTraceCallback
from memtrace.attribution.engines import find_engines

let_fsdp_train()

STEPS = 4


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """Returns the configuration of the document that memtrace began with, for any stage; buckets fit the model."""
    return {
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True},
        },
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": 20_000,
            "stage3_prefetch_bucket_size": 20_000,
            "stage3_param_persistence_threshold": 0,
        },
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
    }


FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "sync_module_states": False,
    "cpu_ram_efficient_loading": False,
}
"""Said in full, since transformers before 5.17 has other defaults."""
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP2, "bf16": True},
    **{f"zero-{stage}": {"deepspeed": deepspeed_settings(stage), "bf16": True} for stage in (1, 2, 3)},
}


class Examples(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 331, (16,), generator=generator), "labels": index % 3}


class WaitForScrape(TrainerCallback):
    """Keeps one step waiting until the test has scraped every rank; notes what was trained."""

    def __init__(self, scraped: Path) -> None:
        self.engines: list[str] = []
        self._scraped = scraped
        self._hold_at = int(os.environ["HOLD_AT"])

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.engines = [engine.name for engine in find_engines(model, [optimizer])]
        while state.global_step == self._hold_at and not self._scraped.exists():
            time.sleep(0.01)


def train(engine: str, callbacks: list[Any]) -> dict[str, Any]:
    """Returns the losses and a checksum of the final weights."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        learning_rate=1e-5,
        weight_decay=0.01,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_grad_norm=1.0,
        max_steps=STEPS,
        logging_steps=1,
        output_dir=str(Path(os.environ["RUN_DIR"], engine)),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **ENGINES[engine],
    )
    if engine == "fsdp2":
        # Accelerate asks for FSDP only where it found several accelerators, and a CPU is none to it: this word of its
        # state is changed, everything after it is its own way.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_XPU
        os.environ["FSDP_VERSION"] = "2"  # as `accelerate launch` says it: Trainer itself did not before transformers 5
    trainer = Trainer(build_model(), arguments, train_dataset=Examples(), callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": checksum(trainer.model)}


def compare(engine: str) -> dict[str, Any]:
    """Trains without and with memtrace."""
    plain = train(engine, [])
    waiting = WaitForScrape(Path(os.environ["SCRAPED"], engine))
    callback = MemTraceCallback(strict=True, port=int(os.environ["PORT"]), device_poll_seconds=0)
    watched = train(engine, [callback, waiting])
    return {"plain": plain, "watched": watched, "engines": waiting.engines}


def main() -> None:
    logging.disable(logging.WARNING)
    engines = sys.argv[1:]
    if any(engine.startswith("zero") for engine in engines):
        import deepspeed

        # Gloo alone: the shared-memory collectives would be compiled first, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gc.freeze()  # the engines ask for collections: what imports have made is left out of them
    write_report({engine: compare(engine) for engine in engines})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

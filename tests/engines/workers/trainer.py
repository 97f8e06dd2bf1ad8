"""Trains with Trainer and an engine twice, without and with the callback, and leaves logs and target files."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import build_model
from report import checksum, write_report
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from memtrace import MemTraceCallback

STEPS = 4
DEEPSPEED = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 20_000},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 2,
}
ENGINES: dict[str, dict[str, Any]] = {
    "deepspeed": {"deepspeed": DEEPSPEED, "bf16": True},
    "ddp": {},
}


class Examples(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 331, (16,), generator=generator), "labels": index % 3}


class WaitForScrape(TrainerCallback):
    """Keeps the last step waiting until the test has scraped every rank."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scraped = Path(os.environ["SCRAPED"])
        while state.global_step == STEPS and not scraped.exists():
            time.sleep(0.01)


def train(name: str, callbacks: list[Any]) -> tuple[list[float], list[float]]:
    """Returns the losses and a checksum of the final weights."""
    torch.manual_seed(0)
    settings = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "max_steps": STEPS,
        "logging_steps": 1,
        "output_dir": os.environ["RUN_DIR"],
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**settings, **ENGINES[name])
    trainer = Trainer(build_model(), arguments, train_dataset=Examples(), callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, checksum(trainer.model)


def main() -> None:
    logging.disable(logging.WARNING)
    if "deepspeed" in sys.argv:
        import deepspeed

        # Gloo alone: the shared-memory collectives would be compiled first, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name = sys.argv[1]
    plain = train(name, [])
    callback = MemTraceCallback(strict=True, port=int(os.environ["PORT"]), device_poll_seconds=0)
    watched = train(name, [callback, WaitForScrape()])
    write_report({"plain": plain, "watched": watched})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

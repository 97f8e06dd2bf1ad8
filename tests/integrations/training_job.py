"""A real fine-tune in a process of its own: `python training_job.py SCENARIO PORT DIRECTORY`.

Scenarios: `growing` (batches grow toward a limit), `leak` (a list keeps a tensor of every step), `healthy`. Where a job
has to wait for the test, it waits for the file `go` in its directory, and says so with a file `waiting`.
"""

from __future__ import annotations

import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from memtrace import MemTraceCallback

MIB = 2**20
VOCABULARY = 512
LEAK_LENGTH = 1024
HEALTHY_STEPS = 40
GROWING = (48, 64, 96, 128, 192, 80, 256, 112, 320, 160, 384, 224, 448, 288, 512)
"""Positions of the batches that fit."""
TOO_LONG = 4096
"""Positions of the batch that does not."""


class Texts(Dataset[dict[str, torch.Tensor]]):
    """As many samples as are asked for, of the lengths given, over and over."""

    def __init__(self, lengths: tuple[int, ...], count: int) -> None:
        self._lengths = [length for length, _ in zip(cycle(lengths), range(count), strict=False)]

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(self._lengths[index]) * 7 % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


class Hold(TrainerCallback):
    """Waits for the test before a step; stops in the end, so that the metrics stay up while the test looks."""

    def __init__(self, directory: Path, before_step: int) -> None:
        self._directory, self._before = directory, before_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._before:
            (self._directory / "waiting").touch()
            while not (self._directory / "go").exists():
                time.sleep(0.05)


class KeepsOutputs(Trainer):
    """Keeps the logits of every step in a list, for a metric that nobody computes."""

    kept: ClassVar[list[torch.Tensor]] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        self.kept.append(outputs.logits.detach())
        return (loss, outputs) if return_outputs else loss


def train(
    directory: Path,
    callbacks: list[TrainerCallback],
    lengths: tuple[int, ...],
    steps: int,
    trainer: type[Trainer] = Trainer,
) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TOO_LONG,
    )
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=1,
        max_steps=steps,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    trainer(model=model, args=arguments, train_dataset=Texts(lengths, steps), callbacks=callbacks).train()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def main(scenario: str, port: int, directory: Path) -> None:
    settings: dict[str, Any] = {
        "port": port,
        "trace_every": 1,
        "strict": True,
        "run_name": scenario.replace("_", "-"),
        "device_poll_seconds": 0.1,
    }
    if scenario == "growing":
        lengths = (*GROWING, TOO_LONG)
        settings |= {"max_tokens": TOO_LONG, "device_limit_bytes": resident() + 160 * MIB}
        extra: list[TrainerCallback] = [Hold(directory, len(lengths))]
        train(directory, [MemTraceCallback(**settings), *extra], lengths, len(lengths))
    elif scenario == "leak":
        settings["device_limit_bytes"] = resident() + 4096 * MIB
        train(directory, [MemTraceCallback(**settings), Hold(directory, 40)], (LEAK_LENGTH,), 40, KeepsOutputs)
    else:
        settings |= {"max_tokens": 512, "device_limit_bytes": resident() + 2048 * MIB, "trace_every": None}
        train(directory, [MemTraceCallback(**settings), Hold(directory, HEALTHY_STEPS)], GROWING, HEALTHY_STEPS)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

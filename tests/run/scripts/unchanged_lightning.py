"""A Trainer of Lightning, by the name that is the first argument, that knows nothing of memtrace."""

import importlib
import sys

import digests
import ends
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = importlib.import_module(sys.argv[1])
pl.seed_everything(0)


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


model = Regression()
ends.in_call(model.network, 5)
silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(max_steps=6, accelerator="cpu", **silent)
trainer.fit(model, DataLoader(TensorDataset(torch.randn(32, 32)), 4))
print(digests.of(model))

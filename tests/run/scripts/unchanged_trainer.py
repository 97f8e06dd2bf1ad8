"""A Hugging Face Trainer that knows nothing of memtrace."""

import digests
import ends
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

set_seed(0)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 64), nn.Linear(64, 1)

    def forward(self, x=None, labels=None):
        return {"loss": (self.outer(self.inner(x).relu()) - labels).square().mean()}


samples = [{"x": torch.randn(16), "labels": torch.randn(1)} for _ in range(32)]
arguments = TrainingArguments(
    output_dir="out",
    max_steps=6,
    per_device_train_batch_size=4,
    report_to="none",
    use_cpu=True,
    save_strategy="no",
    disable_tqdm=True,
)
model = Regression()
ends.in_call(model, 5)
trainer = Trainer(model, arguments, train_dataset=samples)
trainer.train()
print(digests.of(trainer.model))

"""A loop with Accelerate, gradient accumulation and a schedule, that knows nothing of memtrace."""

import digests
import ends
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
ends.in_call(model, 9)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
batches = DataLoader(TensorDataset(torch.randn(56, 32)), 4)
model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
for (x,) in batches:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
print(digests.of(accelerator.unwrap_model(model)))

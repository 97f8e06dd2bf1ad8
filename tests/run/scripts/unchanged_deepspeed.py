"""DeepSpeed's engine, ZeRO-2, on every rank that is launched, that knows nothing of memtrace."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import digests
import ends
import torch
import torch.distributed as dist
from torch import nn

torch.manual_seed(0)
deepspeed.init_distributed(dist_backend="gloo")
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
settings = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
ends.in_call(model, 5, tells=dist.get_rank() == 0)
if dist.get_rank() and "END" in os.environ:
    os.environ["END"] = "asked"  # by the launcher, when the first rank has ended
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
torch.manual_seed(dist.get_rank())
for _ in range(6):
    loss = engine(torch.randn(4, 64, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    engine.step()
if dist.get_rank() == 0:
    print(digests.of(model.float()))
dist.destroy_process_group()

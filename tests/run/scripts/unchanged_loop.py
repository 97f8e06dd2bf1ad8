"""A plain loop that knows nothing of memtrace, and the ways in which it ends."""

import os
import signal
import sys
import time

import digests
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(6):
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
print(digests.of(model), flush=True)
end = sys.argv[1] if len(sys.argv) > 1 else "well"
if end == "status":
    sys.exit(3)
if end == "exception":
    raise ValueError("bad data")
if end == "signal":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

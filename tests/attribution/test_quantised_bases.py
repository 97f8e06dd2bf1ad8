"""Quantised bases that keep their weights in buffers and attributes, under LoRA, in windows from birth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_training import EVERY_STEP
from torch import nn

from memtrace import Category, Moment
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

INSIDE, OUTSIDE, GROUP = 64, 128, 32


class Gptq(nn.Module):
    """Four bits, eight to an int32, with scales, zeros and an index of groups: all buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(INSIDE // 8, OUTSIDE, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(INSIDE // GROUP, OUTSIDE // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(INSIDE // GROUP, OUTSIDE, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(INSIDE, dtype=torch.int32) // GROUP)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.qweight.repeat_interleave(8, 0).float() * self.scales[self.g_idx.long()].float()
        return x @ weight


class Awq(nn.Module):
    """The same with eight columns to an int32, and no index."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(INSIDE, OUTSIDE // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(INSIDE // GROUP, OUTSIDE // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(INSIDE // GROUP, OUTSIDE, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.repeat_interleave(8, 1).float()


class Hqq(nn.Module):
    """A packed parameter, with scales in a dictionary that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(INSIDE, OUTSIDE // 2, dtype=torch.uint8), requires_grad=False)
        self.meta = {"nbits": 4, "scale": torch.ones(INSIDE, 1), "zero": torch.zeros(INSIDE, 1), "shape": (1, 2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.W_q.repeat_interleave(2, 1) * self.meta["scale"] - self.meta["zero"])


@dataclass
class State:
    """As 8-bit layers of bitsandbytes have it."""

    SCB: torch.Tensor


class EightBit(nn.Module):
    """Integers in a buffer, their scales in an object of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(INSIDE, OUTSIDE, dtype=torch.int8))
        self.state = State(SCB=torch.ones(OUTSIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.state.SCB)


class NotQuantised(nn.Module):
    """Buffers of integers as models have them: positions, masks as old models keep them, statistics, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(INSIDE, OUTSIDE), requires_grad=False)
        self.register_buffer("position_ids", torch.arange(256).expand(1, -1).contiguous())
        self.register_buffer("bias", torch.ones(1, 1, 32, 32, dtype=torch.uint8))
        self.register_buffer("running_mean", torch.zeros(OUTSIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class WithAdapter(nn.Module):
    """A frozen base and a LoRA pair beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(INSIDE, 4, bias=False), nn.Linear(4, OUTSIDE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def sizes(kind: type[nn.Module]) -> dict[Any, int]:
    """Returns bytes by (category, component) at the end of a step traced from birth, which obeys law 1."""
    source = CpuEvents()
    source.open()
    model = WithAdapter(kind())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Tracer(model, optimizer, EVERY_STEP, source=source) as tracer:
        model(torch.randn(4, INSIDE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for moment in tracer.latest.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
    found: dict[Any, int] = {}
    for key, size in tracer.latest.moments[Moment.STEP_END].entries.items():
        role = (key.category, "" if key.category is Category.UNATTRIBUTED else key.component)
        found[role] = found.get(role, 0) + size
    return found


GROUPS = INSIDE // GROUP


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        (Gptq, INSIDE * OUTSIDE // 2 + GROUPS * OUTSIDE // 2 + 2 * GROUPS * OUTSIDE + 4 * INSIDE),
        (Awq, INSIDE * OUTSIDE // 2 + GROUPS * OUTSIDE // 2 + 2 * GROUPS * OUTSIDE),
        (Hqq, INSIDE * OUTSIDE // 2 + 2 * 4 * INSIDE),
        (EightBit, INSIDE * OUTSIDE + 4 * OUTSIDE),
    ],
)
def test_a_quantised_base_is_frozen_weights(kind: type[nn.Module], frozen: int) -> None:
    """Packed integers, scales, zeros and indices, to the byte; nothing of it is a buffer or claimed by nobody."""
    found = sizes(kind)
    assert found[Category.WEIGHTS, "frozen"] == frozen
    assert found[Category.WEIGHTS, "trainable"] == 4 * 4 * (INSIDE + OUTSIDE)
    assert (Category.BUFFERS, "") not in found
    assert found.get((Category.UNATTRIBUTED, ""), 0) < 1024


def test_integers_in_buffers_of_other_layers_stay_buffers() -> None:
    """Positions, masks and statistics are no weights."""
    found = sizes(NotQuantised)
    assert found[Category.WEIGHTS, "frozen"] == 4 * INSIDE * OUTSIDE
    assert found[Category.BUFFERS, ""] == 8 * 256 + 32 * 32 + 4 * OUTSIDE

"""What is offloaded: persistent tensors on the CPU while another device is watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memtrace.attribution.engines import Engine
from memtrace.attribution.models.host import HostMemory
from memtrace.attribution.scan import Scan
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category

GPU = torch.device("cuda", 0)
PARAMETERS = 6 * 5 + 5


@pytest.fixture
def offloaded() -> Iterator[Scan]:
    """bf16 weights elsewhere (meta tensors stand for a GPU's), fp32 masters with their gradients and AdamW here."""
    model = nn.Linear(6, 5, device="meta", dtype=torch.bfloat16)
    masters = [torch.zeros(p.shape, requires_grad=True) for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    yield Scan(model, optimizer)
    del optimizer  # the scan does not hold it


def test_offloaded_states_are_on_the_host(offloaded: Scan) -> None:
    """Masters, gradients and both moments, four bytes a parameter each; the weights are not here."""
    host = HostMemory(offloaded, GPU)
    host.look()
    size = 4 * PARAMETERS
    assert host.entries == {
        EntryKey(Category.MASTER_WEIGHTS, "", "float32"): size,
        EntryKey(Category.GRADIENTS, "", "float32"): size,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): size,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"): size,
        EntryKey(Category.OPTIMIZER_STATE, "step", "float32"): 2 * 4,
    }


def test_each_look_starts_anew(offloaded: Scan) -> None:
    """What has gone from the host is not told again."""
    host = HostMemory(offloaded, GPU)
    host.look()
    for master in offloaded.optimizers[0].param_groups[0]["params"]:
        master.grad = None
    host.look()
    assert {key.category for key in host.entries} == {Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE}


def test_on_a_cpu_nothing_is_apart(offloaded: Scan) -> None:
    """Device and host are one: everything is in the breakdown."""
    host = HostMemory(offloaded, torch.device("cpu"))
    host.look()
    assert host.entries == {}


def test_an_engine_says_where_it_computes() -> None:
    """Its shards may wait on the CPU: the device that is watched is the one where the engine puts them together."""

    class Offloading(Engine):
        device = GPU

    model = nn.Linear(6, 5)
    scan = Scan(model, torch.optim.AdamW(model.parameters()))
    assert scan.device == torch.device("cpu")
    scan.engines = [Offloading()]
    assert scan.device == GPU

"""Real failures of a CUDA device's allocator, in the forward pass, the backward pass and the optimizer's step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_training import reports_in
from torch import nn

from memtrace import MemoryTracer, TracerConfig
from memtrace.record.categories import Phase
from memtrace.record.oom.report import OomReport, Witness

pytestmark = pytest.mark.gpu

WIDTH = 2048
MANY_ROWS = 1 << 16
"""512 MiB of input: it fits into what is allowed, what the layers save of it does not."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    device = torch.device("cuda", 0)
    torch.cuda.init()
    gc.collect()  # what the test before has left in cycles, such as the frames of its exception
    torch.cuda.empty_cache()
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


class WideGradient(torch.autograd.Function):
    """The identity, whose gradient needs more than is allowed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.empty(1 << 36, dtype=torch.uint8, device=gradient.device)
        return gradient


class Model(nn.Module):
    """Eight wide layers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, device=device) for _ in range(8))
        self.greedy_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        if self.greedy_backward:
            x = WideGradient.apply(x)
        return x.square().mean()


def run_out(device: torch.device, tmp_path: Path, place: str, **settings: Any) -> tuple[OomReport, int]:
    """Trains until memory runs out in one place; returns the report and what the allocator had then, as requested."""
    model = Model(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    config = TracerConfig(port=None, strict=True, log_dir=tmp_path, **settings)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    held: list[int] = []
    torch._C._cuda_attach_out_of_memory_observer(
        lambda *_: held.append(torch.cuda.memory_stats(device)["requested_bytes.all.current"])
    )
    total = torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(torch.OutOfMemoryError), MemoryTracer(model, optimizer, config):
        batch = torch.randn(MANY_ROWS if place == "forward" else 64, WIDTH, device=device)
        if place == "optimizer":  # weights and gradients fit, the state does not
            torch.cuda.set_per_process_memory_fraction((3.2 * parameters + 2**28) / total, device)
        else:
            for _ in range(3):
                model(torch.randn(64, WIDTH, device=device)).backward()
                optimizer.step()
                optimizer.zero_grad()
            model.greedy_backward = place == "backward"
            torch.cuda.set_per_process_memory_fraction((8 * parameters + 2**30) / total, device)
        for _ in range(2):
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    reports = reports_in(tmp_path)
    return reports[-1], held[-1]


@pytest.mark.parametrize("traced", [0, 1], ids=["counted", "traced"])
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_real_failure_is_reported_with_everything_allocated(
    device: torch.device, tmp_path: Path, place: str, traced: int
) -> None:
    """The composition adds up to what was allocated within 1 %, in the right phase, told by the allocator."""
    report, requested = run_out(device, tmp_path, place, trace_every=traced)
    assert report.request.witness is Witness.ALLOCATOR
    assert not report.request.pending
    assert report.request.phase is Phase(place)
    assert report.composition.complete
    assert report.composition.total_bytes == pytest.approx(requested, rel=0.01)
    assert report.request.message.startswith("OutOfMemoryError")
    assert report.request.bound_bytes <= report.request.segment_bytes * 1.01  # the message rounds to two decimals
    assert report.holders[0].name == "layers.*"


def test_small_request_is_told_beside_its_segment(device: torch.device, tmp_path: Path) -> None:
    """For 3 MiB the allocator wants a segment of 20 MiB, and says so everywhere: the report calls it by its name."""
    model = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    config = TracerConfig(port=None, strict=True, log_dir=tmp_path, trace_every=0)
    total = torch.cuda.get_device_properties(device).total_memory
    held: list[torch.Tensor] = []
    with pytest.raises(torch.OutOfMemoryError), MemoryTracer(model, optimizer, config):
        torch.cuda.set_per_process_memory_fraction(2**28 / total, device)
        while True:
            held.append(torch.empty(3 << 20, dtype=torch.uint8, device=device))
    (report,) = reports_in(tmp_path)
    assert report.request.requested_bytes in (None, 3 << 20)  # were the message ever to have the request, it is taken
    assert report.request.segment_bytes == 20 << 20


def test_failure_that_is_caught_is_pending(device: torch.device, tmp_path: Path) -> None:
    """A failure that nobody shows memtrace has one report that says so, however often it comes, and does not count."""
    model = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    config = TracerConfig(port=None, strict=True, log_dir=tmp_path, trace_every=0)
    with MemoryTracer(model, optimizer, config) as tracer:
        for _ in range(5):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(1 << 44, dtype=torch.uint8, device=device)
        assert tracer.snapshot().totals.ooms == 0
    (report,) = reports_in(tmp_path)
    assert report.request.pending


def test_report_neither_allocates_nor_synchronises(device: torch.device, tmp_path: Path) -> None:
    """Making a report leaves the allocator's counters alone and passes torch's check for synchronisation."""
    model = Model(device)
    optimizer = torch.optim.AdamW(model.parameters())
    with MemoryTracer(model, optimizer, TracerConfig(port=None, strict=True, log_dir=tmp_path)):
        before = torch.cuda.memory_stats(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(1 << 44, dtype=torch.uint8, device=device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats(device)
    assert len(reports_in(tmp_path)) == 1
    for counter in ("allocation.all.allocated", "allocated_bytes.all.current", "reserved_bytes.all.current"):
        assert after[counter] == before[counter]

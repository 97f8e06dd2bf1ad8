"""Which source answers for which device."""

from __future__ import annotations

import logging

import pytest
import torch

from memtrace.sources.cpu import CpuEvents
from memtrace.sources.cuda import CudaEvents
from memtrace.sources.event_source import event_source


def test_cuda_and_the_cpu() -> None:
    """Each has its own."""
    assert isinstance(event_source(torch.device("cuda", 0)), CudaEvents)
    assert isinstance(event_source(torch.device("cpu")), CpuEvents)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_another_kind_of_device(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Never the CPU's events beside another device's addresses: no window, and one line that says so."""
    source = event_source(torch.device(kind, 0))
    with caplog.at_level(logging.WARNING, logger="memtrace"):
        assert [source.open(), source.open(1000)] == [False, False]
    assert not source.is_open
    assert source.reading() is None
    assert not source.interrupted()
    assert source.fits(10**9)
    source.abandon()
    assert [kind in record.getMessage() for record in caplog.records] == [True]

"""What the processes of an engine test hand to the test: one JSON file a rank."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from all_threads import AllThreadsEvents
from torch import nn
from torch.distributed.tensor import DTensor

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.tracing.tracer import Tracer

MICRO_BATCHES = 2
STEPS = 3


def write_report(report: dict[str, Any]) -> None:
    """Writes `<REPORT_DIR>/rank<R>.json`."""
    rank = os.environ.get("RANK", "0")
    Path(os.environ["REPORT_DIR"], f"rank{rank}.json").write_text(json.dumps(report))


def record_to_json(record: StepRecord) -> dict[str, Any]:
    """Returns the moments of a record with their entries as rows."""
    return {
        "step": record.step,
        "traced": record.traced,
        "moments": {
            moment.value: {
                "allocated_bytes": breakdown.allocated_bytes,
                "entries": [[*key, size] for key, size in breakdown.entries.items()],
            }
            for moment, breakdown in record.moments.items()
        },
    }


def traced_records(
    model: nn.Module, optimizer: Any, source: AllThreadsEvents, training: Iterable[object]
) -> list[dict[str, Any]]:
    """Returns the records of `STEPS` steps, of which the last one is traced too.

    Args:
        model: the model as the engine has it.
        optimizer: what is stepped.
        source: open since before the model was built.
        training: yields before the first step and after each one.
    """
    config = TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)
    with Tracer(model, optimizer, config, source=source, explicit_steps=True) as tracer:
        for number, _ in enumerate(training):
            if number:
                tracer.end_step()
            if number == STEPS - 1:
                tracer.trace_next()
            if number < STEPS:
                tracer.begin_step()
        return [record_to_json(record) for record in tracer.history]


def peak_without_memtrace(train: Callable[[], Iterable[object]], step: int) -> int:
    """Returns the peak of allocated bytes in one step of a run from birth that memtrace has no part in.

    Args:
        train: builds everything, then yields before the first step and after each one.
        step: the number of the step, from 1.
    """
    gc.collect()
    source = AllThreadsEvents()
    assert source.open(), "another profiler records"
    marks = []
    for _ in train():
        marks.append(time.time_ns())
    window = source.close()
    position = marks[step - 1], marks[step]
    total, peak = 0, 0
    live: dict[int, int] = {}
    for event in window.events:
        if event.delta > 0:
            total += event.delta - live.pop(event.address, 0)
            live[event.address] = event.delta
        else:
            total -= live.pop(event.address, 0)
        if position[0] <= event.time_ns <= position[1]:
            peak = max(peak, total)
    return peak


def checksum(model: nn.Module) -> list[float]:
    """Returns a sum of each parameter that differs where one bit of it does, nearly always."""
    return [
        float(local(p).double().mul(torch.arange(1, local(p).numel() + 1).view_as(local(p))).sum())
        for p in model.parameters()
    ]


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the part of a parameter that this rank holds."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached

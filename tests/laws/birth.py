"""Runs that are recorded from birth: the window of events is open before the model is built."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from unittest import mock

import torch
from laws.families import Combination
from laws.loop import Loop

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window
from memtrace.tracing.tracer import Tracer

STRICT = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=0)


class KeptEvents(CpuEvents):
    """The CPU's source, which keeps the last window that it returned, and the profiler's own count beside it."""

    window: Window
    totals: list[int]
    """What the profiler counted after each event; bytes of the blocks that it has seen since the process began."""

    def close(self) -> Window:
        disable, recorded = torch.autograd._disable_profiler, []  # type: ignore[attr-defined]

        def keep() -> object:
            recorded.append(disable())
            return recorded[-1]

        with mock.patch.object(torch.autograd, "_disable_profiler", keep):
            self.window = super().close()
        nodes = [node for result in recorded for node in result.experimental_event_tree()]
        nodes.sort(key=attrgetter("start_time_ns"))
        self.totals = [node.extra_fields.total_allocated for node in nodes]
        return self.window


@contextmanager
def events_from_birth() -> Iterator[KeptEvents]:
    """Opens a window in which nothing of earlier tests is freed."""
    gc.collect()
    source = KeptEvents()
    assert source.open()
    try:
        yield source
    finally:
        source.abandon()


@dataclass(frozen=True, slots=True, kw_only=True)
class BornRun:
    """Two steps of one combination, recorded from before the model was built; the second one is the traced one."""

    loop: Loop
    losses: list[torch.Tensor]
    record: StepRecord
    window: Window
    totals: Sequence[int]
    """What the profiler counted after each event of the window."""
    begin_ns: int
    end_ns: int

    def profiler_peak_bytes(self) -> int:
        """The profiler's own total at its highest in the second step, without what was there before birth."""
        totals, events = self.totals, self.window.events
        assert len(totals) == len(events)
        before_birth = totals[0] - events[0].delta
        within = [i for i, event in enumerate(events) if self.begin_ns <= event.time_ns <= self.end_ns]
        return max(totals[within[0] - 1 : within[-1] + 1]) - before_birth


def run_from_birth(combination: Combination) -> BornRun:
    """Builds and trains a combination for two steps under a tracer."""
    torch.manual_seed(0)
    with events_from_birth() as source:
        loop = Loop(combination)
        with Tracer(loop.model, loop.optimizer, STRICT, source=source) as tracer:
            loop.step()
            begin_ns = time.time_ns()
            losses = loop.step()
            end_ns = time.time_ns()
    record = tracer.latest
    assert record is not None
    return BornRun(
        loop=loop,
        losses=losses,
        record=record,
        window=source.window,
        totals=source.totals,
        begin_ns=begin_ns,
        end_ns=end_ns,
    )

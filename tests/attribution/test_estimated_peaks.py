"""Peaks between traces in a training whose allocator has counters: a CPU whose counters a meter stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from small_training import CLASSES, EVERY_STEP, FLOAT, ON_DEMAND, WIDTH, make, step, traced

from memtrace.adapters.exports import Exports
from memtrace.config import TracerConfig
from memtrace.exporters.live import parse_scrape
from memtrace.exporters.prometheus import render_text
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record import metrics
from memtrace.record.breakdown import AllocatorReading
from memtrace.record.categories import Category, Moment
from memtrace.record.metric import Metric
from memtrace.sources.cpu import CpuEvents
from memtrace.tracing.tracer import Tracer

ROWS = 600
"""So many that the peak of a step is in its backward pass."""
A_ROW = FLOAT * (3 * WIDTH + CLASSES)
"""Bytes that a forward pass really adds for a row: three outputs of tanh, and the logits."""
HELD = 50_000_000


class Meter(CpuEvents):
    """The events of the CPU, and counters of its own: a forward pass adds `A_ROW` bytes a row until the step ends."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.mark = HELD, 2 * HELD
        self.beyond = 0
        """What the backward pass takes for a moment."""

    def watch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def forward(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            self.held = HELD + A_ROW * len(args[0])
            self.mark = max(self.mark, self.held)

        def update(*_: object) -> None:
            self.mark = max(self.mark, self.held + self.beyond)
            self.held = HELD

        model.first.register_forward_pre_hook(forward)
        optimizer.register_step_pre_hook(update)

    def reading(self) -> AllocatorReading:
        return AllocatorReading(
            allocated_bytes=self.held,
            reserved_bytes=10 * HELD,
            requested_bytes=self.held,
            peak_allocated_bytes=self.mark,
            peak_requested_bytes=self.mark,
        )


@contextmanager
def metered(config: TracerConfig = ON_DEMAND) -> Iterator[tuple[Tracer, Meter, torch.nn.Module, torch.optim.Optimizer]]:
    """A tracer after two steps, the second of them traced."""
    meter = Meter()
    model, optimizer = make()
    meter.watch(model, optimizer)
    with Tracer(model, optimizer, config, source=meter) as tracer:
        for _ in range(2):
            step(model, optimizer, ROWS)
        yield tracer, meter, model, optimizer


def exported(tracer: Tracer, metric: Metric) -> float | None:
    """Returns what a scrape says now."""
    return parse_scrape(render_text(tracer.snapshot()), "scrape").value(metric)


def exact_peak(rows: int) -> int:
    """Returns the traced peak of a third step with so many rows."""
    model, optimizer = make()
    with traced(model, optimizer, EVERY_STEP) as tracer:
        for number in (ROWS, ROWS, rows):
            step(model, optimizer, number)
    return tracer.history[-1].moments[Moment.PEAK].total_bytes


def test_an_estimate_follows_the_batch() -> None:
    """Within 5 % of the peak that a trace of the same step has, for half the batch and for twice the batch."""
    with metered() as (tracer, _, model, optimizer):
        for rows in (ROWS, ROWS // 2, 2 * ROWS):
            step(model, optimizer, rows)
            peak, exact = tracer.history[-1].moments[Moment.PEAK], exact_peak(rows)
            assert (tracer.history[-1].traced, peak.estimated, peak.allocated_bytes) == (False, True, None)
            assert abs(peak.total_bytes - exact) < 0.05 * exact, rows
            assert peak[Category.ACTIVATIONS] > 0
        assert exported(tracer, metrics.STEP_PEAK_ESTIMATED) == 1


def test_a_new_high_water_mark_is_the_measured_peak() -> None:
    """In record and metrics, and what the forecast learns; the next step, which stays below, is estimated again."""
    with metered() as (tracer, meter, model, optimizer):
        meter.beyond = 3 * HELD
        step(model, optimizer, ROWS)
        measured = HELD + A_ROW * ROWS + meter.beyond
        peak, shown = tracer.history[-1].moments[Moment.PEAK], tracer.snapshot()
        assert (peak.allocated_bytes, peak.total_bytes, peak.estimated) == (measured, measured, True)
        assert shown.risk is not None
        assert shown.risk.worst_peak_bytes == measured
        assert exported(tracer, metrics.STEP_PEAK) == exported(tracer, metrics.ALLOCATOR_PEAK) == measured
        assert exported(tracer, metrics.STEP_PEAK_ESTIMATED) == 0
        step(model, optimizer, ROWS)
        assert tracer.history[-1].moments[Moment.PEAK].allocated_bytes is None


def test_a_reset_by_somebody_else_is_noticed(tmp_path: Path) -> None:
    """Counted once, in the log and in the metrics; the mark is the step's own from then on."""
    with metered() as (tracer, meter, model, optimizer):
        exports = Exports.open(tracer.snapshot, tracer.identity, TracerConfig(port=None, log_dir=tmp_path), tmp_path)
        tracer.add_listener(exports.write)
        for reset in (False, True, False):
            if reset:
                meter.mark = meter.held
            step(model, optimizer, ROWS)
        exports.close()
        assert [record.peak_counter_reset for record in tracer.history] == [False] * 3 + [True, False]
        assert tracer.history[3].moments[Moment.PEAK].allocated_bytes == HELD + A_ROW * ROWS
        assert exported(tracer, metrics.PEAK_RESETS) == 1
    assert exports.log_path is not None
    logged = list(read_step_log(exports.log_path))
    assert logged == list(tracer.history[2:])


def test_the_first_step_has_its_peak_where_the_mark_rose() -> None:
    """Before any trace: what the mark says, with what the ledger and the counters know of it."""
    meter = Meter()
    meter.mark = meter.held
    model, optimizer = make()
    meter.watch(model, optimizer)
    with Tracer(model, optimizer, ON_DEMAND, source=meter) as tracer:
        step(model, optimizer, ROWS)
    peak = tracer.history[0].moments[Moment.PEAK]
    assert (peak.allocated_bytes, peak.estimated) == (HELD + A_ROW * ROWS, True)

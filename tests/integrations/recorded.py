"""A recorded run in a real Prometheus.

The steps are those of `tests/fixtures/runs/llama-dynamic-batch-size.jsonl`, a fine-tune on the CPU. To look as on a
GPU, their sizes are multiplied by `SCALE`, and readings of an allocator and a device of 80 GiB are made to fit them.
Each rank begins elsewhere in the run, and on rank 1 an allocation fails after two thirds of it. What is exported is
written by memtrace's own exporter; the alert of that failure is as Prometheus would have kept it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from memtrace.exporters.prometheus import render_text
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.record.breakdown import AllocatorReading, Breakdown, DeviceReading, StepRecord
from memtrace.record.categories import Moment
from memtrace.record.risk_reading import LargestBatch, ShapeSource
from memtrace.record.snapshot import RunIdentity, Snapshot, Totals
from memtrace.risk import RiskMonitor

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "llama-dynamic-batch-size.jsonl"
SCALE = 768
GIB = 2**30
TOTAL = 80 * GIB
INTERVAL = 15.0
ALERT = 'alertname="MemtraceOutOfMemory",alertstate="firing",severity="critical"'
RUN_ID = "4711"
ALERT_STEPS = 40  # the ten minutes that the rule looks back
LARGEST = LargestBatch(tokens=1100, positions=512, source=ShapeSource.DATASET)


def snapshots(rank: int, world_size: int, steps: int, end: float) -> Iterator[Snapshot]:
    """Yields the snapshot after each step of a rank; the last one is of `end`, in seconds since 1970."""
    records = list(read_step_log(RUN))[1:]
    first = rank * 11 % len(records)
    monitor = RiskMonitor(LARGEST)
    reserved = 0
    plan = {Moment.PEAK: _scaled(max(records, key=_peak).moments[Moment.PEAK], SCALE * 0.9)}
    identity = RunIdentity(
        run_name="llama-3-8b-chat",
        run_id=RUN_ID,
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        device=f"cuda:{rank}",
        gpu_uuid=f"GPU-{rank:08d}-0000-0000-0000-000000000000",
    )
    for number, record in enumerate(islice(cycle(records[first:] + records[:first]), steps), 1):
        peak = round(_peak(record) * SCALE)
        reserved = max(reserved, round(peak * 1.06))
        step = _on_gpu(record, number, identity, reserved, end - INTERVAL * (steps - number))
        totals = Totals(
            steps=number * 40,
            traced_steps=number,
            self_seconds=0.003 * INTERVAL * number,
            slowed_seconds=0.001 * INTERVAL * number,
            retries=number // 90,
            ooms=int(rank == 1 and number > steps * 2 // 3),
        )
        snapshot = Snapshot(
            identity=identity,
            totals=totals,
            latest=step,
            latest_traced=step,
            device_memory=step.device_memory,
            plan=plan,
        )
        yield replace(snapshot, risk=monitor.observe(step, headroom_bytes=snapshot.headroom_bytes))


def open_metrics(ranks: int, steps: int, end: float, job: str = "training") -> Iterator[str]:
    """Yields the lines of a run of so many ranks, one sample a step, in the OpenMetrics format."""
    for rank in range(ranks):
        target = f'job="{job}",instance="gpu-node-{rank // 8}:{16368 + rank % 8}"'
        for snapshot in snapshots(rank, ranks, steps, end):
            assert snapshot.latest is not None
            if snapshot.totals.ooms and snapshot.totals.traced_steps <= steps * 2 // 3 + ALERT_STEPS:
                run = f'{target},run="{snapshot.identity.run_name}",run_id="{RUN_ID}",rank="{rank}"'
                yield f"ALERTS{{{ALERT},{run}}} 1 {snapshot.latest.unix_seconds:.3f}"
            for line in render_text(snapshot).splitlines():
                if not line.startswith("#"):
                    series, value = line.rsplit(" ", 1)
                    name, labels = series.removesuffix("}").split("{")
                    yield f"{name}{{{target},{labels}}} {value} {snapshot.latest.unix_seconds:.3f}"
    yield "# EOF"


def backfill(directory: Path, *, ranks: int, steps: int, end: float) -> Path:
    """Writes such a run as data of a Prometheus and returns their directory."""
    text, data = directory / "run.om", directory / "data"
    text.write_text("\n".join(open_metrics(ranks, steps, end)) + "\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)]
    subprocess.run(command, check=True, capture_output=True)
    return data


def _peak(record: StepRecord) -> int:
    return record.moments[Moment.PEAK].total_bytes


def _scaled(breakdown: Breakdown, factor: float) -> Breakdown:
    entries = {key: round(size * factor) for key, size in breakdown.entries.items()}
    return replace(breakdown, entries=entries, allocated_bytes=sum(entries.values()))


def _on_gpu(record: StepRecord, number: int, identity: RunIdentity, reserved: int, time: float) -> StepRecord:
    moments = {moment: _scaled(found, SCALE) for moment, found in record.moments.items()}
    allocated = moments[Moment.STEP_END].total_bytes
    process = reserved + round(1.4 * GIB) + (identity.rank % 3) * 2**28
    device = DeviceReading(
        name="NVIDIA H100 80GB HBM3",
        uuid=identity.gpu_uuid,
        total_bytes=TOTAL,
        used_bytes=process + GIB // 2,
        free_bytes=TOTAL - process - GIB // 2,
        process_bytes=process,
        other_processes_bytes=GIB // 2,
        non_torch_bytes=process - reserved,
        free_and_reserved_bytes=TOTAL - process - GIB // 2 + reserved,
        utilization_ratio=0.93 - 0.02 * (number % 5),
        power_watts=620.0,
        temperature_celsius=61.0,
    )
    allocator = AllocatorReading(
        allocated_bytes=allocated, reserved_bytes=reserved, requested_bytes=allocated, retries=0, ooms=0
    )
    return replace(
        record,
        step=number * 40,
        rank=identity.rank,
        device=identity.device,
        unix_seconds=time,
        moments=moments,
        device_memory=device,
        allocator=allocator,
    )

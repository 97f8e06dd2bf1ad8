"""Runs whose every figure is known, and what a Prometheus has of them: several on one port, one after the other.

No two runs, ranks or steps say the same of anything, so that a value that a dashboard shows tells where it is from.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from remote_write import INTERVAL, Labels, Sample, labels_of, with_ends

from memtrace.exporters.prometheus import render_text
from memtrace.record.breakdown import (
    AllocatorReading,
    BatchShape,
    Breakdown,
    DeviceReading,
    EntryKey,
    StepRecord,
    ordered_entries,
)
from memtrace.record.categories import Category, Moment
from memtrace.record.risk_reading import GrowthForecast, LargestBatch, PeakForecast, RiskReading, ShapeSource
from memtrace.record.snapshot import RunIdentity, Snapshot, Totals

GIB = 2**30
STEPS_A_SCRAPE = 4
AT_STEP_END = (Category.WEIGHTS, Category.OPTIMIZER_STATE, Category.BUFFERS, Category.UNATTRIBUTED)
AT_PEAK = (*AT_STEP_END, Category.GRADIENTS, Category.ACTIVATIONS, Category.TEMPORARIES)
PLANNED = (Category.OPTIMIZER_STATE, Category.BUFFERS, Category.GRADIENTS, Category.ACTIVATIONS)
SELF_SHARE, SLOWED_SHARE = 0.002, 0.001
"""Of wall time; a run multiplies them by its id."""

Log = Mapping[int, Mapping[float, Snapshot]]
"""By rank and time of a scrape: the newest step then, and all else that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One launch of a script on some ports of a host, scraped from one number of a scrape to another."""

    job: str
    name: str
    run_id: str
    host: str
    ranks: int
    scrapes: range
    full: float = 0.6
    """Share of the capacity that its peaks take, more or less."""

    def instance(self, rank: int) -> str:
        """The target of a rank."""
        return f"{self.host}:{16368 + rank}"

    def log(self, begin: float) -> Log:
        """Returns what each rank says at each scrape; the scrape of number 0 is at `begin`, in seconds since 1970."""
        return {
            rank: {begin + INTERVAL * number: self._snapshot(rank, number, begin) for number in self.scrapes}
            for rank in range(self.ranks)
        }

    def _snapshot(self, rank: int, number: int, begin: float) -> Snapshot:
        chance = random.Random(f"{self.run_id} {rank} {number}")
        since = number - self.scrapes.start + 1
        steps = since * STEPS_A_SCRAPE * int(self.run_id)
        ended = begin + INTERVAL * number - chance.uniform(1, 5)
        record = self._record(rank, steps, ended, chance)
        peak = record.moments[Moment.PEAK]
        capacity = round(60 * GIB * chance.uniform(0.99, 1))
        expected = round(peak.total_bytes * chance.uniform(1.01, 1.1))
        batch = LargestBatch(tokens=4096, source=ShapeSource.SETTING)
        growth = GrowthForecast(
            category=Category.UNATTRIBUTED,
            bytes_per_step=2.0**20,
            steps_to_limit=1000,
            seconds_to_limit=chance.uniform(4000, 5000),
        )
        identity = RunIdentity(
            run_name=self.name,
            run_id=self.run_id,
            rank=rank,
            local_rank=rank,
            world_size=self.ranks + 1,
            device=f"cuda:{rank}",
            gpu_uuid=f"GPU-{self.host}-{rank}",
        )
        return Snapshot(
            identity=identity,
            begun_unix_seconds=begin + INTERVAL * self.scrapes.start - 10,
            totals=Totals(
                steps=steps,
                traced_steps=since,
                self_seconds=SELF_SHARE * INTERVAL * since * int(self.run_id),
                slowed_seconds=SLOWED_SHARE * INTERVAL * since * int(self.run_id),
                retries=int(self.run_id) * 10 + since // 4,
                ooms=int(rank == 1 and since > 6),
            ),
            latest=record,
            latest_traced=record,
            device_memory=record.device_memory,
            risk=RiskReading(
                step=steps,
                capacity_bytes=capacity,
                peak=PeakForecast(
                    predicted_bytes=expected,
                    band_bytes=round(expected * chance.uniform(0.02, 0.05)),
                    batch=batch,
                    points=4,
                    quadratic=False,
                    category=Category.ACTIVATIONS,
                ),
                growth=growth,
                oom_risk_ratio=chance.uniform(0.1, 0.9),
            ),
            plan={Moment.PEAK: _breakdown(Moment.PEAK, PLANNED, 40 * GIB, chance)},
        )

    def _record(self, rank: int, steps: int, ended: float, chance: random.Random) -> StepRecord:
        moments = {
            Moment.STEP_END: _breakdown(Moment.STEP_END, AT_STEP_END, 16 * GIB, chance),
            Moment.PEAK: _breakdown(Moment.PEAK, AT_PEAK, 60 * GIB * self.full, chance),
        }
        reserved = round(61 * GIB * chance.uniform(0.99, 1))
        outside, others = round(GIB * chance.uniform(1, 2)), round(GIB * chance.uniform(1, 2))
        free = 80 * GIB - reserved - outside - others
        tokens = chance.randrange(100, 4096)
        return StepRecord(
            step=steps,
            rank=rank,
            device=f"cuda:{rank}",
            traced=True,
            unix_seconds=ended,
            self_seconds=0.001,
            batch=BatchShape(shape=(1, tokens), tokens=tokens, largest_micro_batch_tokens=tokens),
            moments=moments,
            allocator=AllocatorReading(
                allocated_bytes=moments[Moment.STEP_END].total_bytes,
                reserved_bytes=reserved,
                private_pool_bytes=round(GIB * chance.uniform(0.1, 0.5)),
            ),
            device_memory=DeviceReading(
                total_bytes=80 * GIB,
                used_bytes=80 * GIB - free,
                free_bytes=free,
                process_bytes=reserved + outside,
                other_processes_bytes=others,
                non_torch_bytes=outside,
                free_and_reserved_bytes=free + reserved,
                utilization_ratio=chance.uniform(0.5, 1),
                power_watts=chance.uniform(400, 700),
                temperature_celsius=chance.uniform(50, 70),
            ),
            run_id=self.run_id,
        )


def _breakdown(moment: Moment, categories: Sequence[Category], about: float, chance: random.Random) -> Breakdown:
    """Returns a breakdown of some categories, two components each, within a tenth of so many bytes."""
    part = about / len(categories) / 2
    entries = {
        EntryKey(category, component, "bfloat16"): round(part * chance.uniform(0.9, 1.1))
        for category in categories
        for component in ("one", "other")
    }
    return Breakdown(moment=moment, entries=ordered_entries(entries), allocated_bytes=sum(entries.values()))


def scraped(runs: Sequence[Run], begin: float) -> dict[Labels, list[Sample]]:
    """Returns all series of these runs, each with a mark of staleness at the scrape that no longer has it."""
    series: dict[Labels, dict[float, float]] = defaultdict(dict)
    for run in runs:
        for rank, snapshots in run.log(begin).items():
            for at, snapshot in snapshots.items():
                for labels, value in _samples(run, rank, snapshot):
                    series[labels][at] = value
    return {labels: with_ends(samples) for labels, samples in series.items()}


def _samples(run: Run, rank: int, snapshot: Snapshot) -> Iterator[tuple[Labels, float]]:
    target = {"job": run.job, "instance": run.instance(rank)}
    yield labels_of("up", target), 1
    for line in render_text(snapshot).splitlines():
        if not line.startswith("#"):
            text, value = line.rsplit(" ", 1)
            name, written = text.removesuffix("}").split("{")
            pairs = (pair.split("=", 1) for pair in written.split(","))
            yield labels_of(name, target | {label: quoted.strip('"') for label, quoted in pairs}), float(value)

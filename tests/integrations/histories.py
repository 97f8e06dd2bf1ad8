"""What a Prometheus would have scraped, told scrape by scrape, and which of the shipped alerts fire on it.

A story says of each moment which ranks are scraped and what they say. All stories are judged in one run of promtool,
each under a job of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

from promql import RULES

from memtrace.exporters.prometheus import render_text
from memtrace.record.snapshot import Snapshot

GB = 1e9
INTERVAL = 15
"""Seconds between two scrapes."""
ABSENT, STALE = "_", "stale"
_SAMPLE = re.compile(r"([\w:]*)\{((?:\w+=\"[^\"]*\"(?:, )?)*)\} ([-+\w.]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
PAGE_OR_TICKET = "warning|critical"

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]


class Told(Protocol):
    """One scrape of one target."""

    def target(self) -> Labels:
        """Returns the labels of the target."""

    def samples(self) -> Iterator[Sample]:
        """Yields all samples of the scrape."""


Story = Callable[[int], Iterable[Told]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """What one rank of a healthy run on a GPU of 85 GB says at one scrape, unless told otherwise; sizes in bytes."""

    at: float
    instance: str = "a:0"
    answers: bool = True
    """False for a target that Prometheus knows and does not reach."""
    run: str = "chat"
    run_id: str = ""
    rank: int = 0
    world: int = 1
    started: float = 0
    state: str = "running"
    working: bool = True
    steps: float | None = None
    """None where one ends each second."""
    last_step: float | None = None
    """None where one has just ended; NaN where none has."""
    last_traced: float | None = None
    peak: float = 40 * GB
    run_peak: float | None = None
    capacity: float = 80 * GB
    allocated: float = 20 * GB
    """NaN on a CPU, which has no caching allocator."""
    reserved: float | None = None
    """None where it is a little more than the peak."""
    private_pool: float = 0
    weights: float = 10 * GB
    unattributed: float = 0
    comm: float = 0
    non_torch: float = GB
    total: float = 85 * GB
    risk: float = 0
    time_to_limit: float | None = None
    plan: float | None = None
    retries: float = 0
    ooms: float = 0
    self_share: float = 0.001
    text_file: bool = False
    """Whether it is the file that a textfile collector reads: run and launch are labels of every series there."""

    def target(self) -> Labels:
        """Returns the labels of the target."""
        return {"instance": self.instance}

    def samples(self) -> Iterator[Sample]:
        """Yields all samples of the scrape."""
        yield "up", {}, float(self.answers)
        if self.answers:
            run_id = {"run_id": self.run_id} if self.run_id else {}
            identity = {"rank": str(self.rank)} | ({"run": self.run, **run_id} if self.text_file else {})
            for name, labels, value in (*self._run(), *(self._memory() if self._has_stepped() else ())):
                yield f"memtrace_{name}", identity | labels, value

    def _has_stepped(self) -> bool:
        return self.last_step is None or self.last_step == self.last_step

    def _run(self) -> Iterator[Sample]:
        age = self.at - self.started
        run_id = {"run_id": self.run_id} if self.run_id else {}
        if not self.text_file:
            yield "run_info", {"run": self.run, "world_size": str(self.world), **run_id}, 1
        yield "run_state", {"run": self.run, "state": self.state, **run_id}, 1
        yield "run_start_timestamp_seconds", {}, self.started
        yield "up", {}, float(self.working)
        yield "world_size", {}, self.world
        yield "steps_total", {}, age if self.steps is None else self.steps
        yield "traced_steps_total", {}, 1
        yield "self_seconds_total", {}, age * self.self_share
        yield "slowed_seconds_total", {}, 0
        yield "allocator_retries_total", {}, self.retries
        yield "ooms_total", {}, self.ooms
        yield "non_torch_bytes", {}, self.non_torch
        yield "device_total_bytes", {}, self.total

    def _memory(self) -> Iterator[Sample]:
        yield "last_step_timestamp_seconds", {}, self.at if self.last_step is None else self.last_step
        yield "last_traced_step_timestamp_seconds", {}, self.at if self.last_traced is None else self.last_traced
        yield "step_peak_bytes", {}, self.peak
        yield "capacity_bytes", {}, self.capacity
        yield "oom_risk_ratio", {}, self.risk
        if self.allocated == self.allocated:
            yield "allocator_allocated_bytes", {}, self.allocated
            yield "allocator_reserved_bytes", {}, self.peak * 1.05 if self.reserved is None else self.reserved
            yield "allocator_private_pool_bytes", {}, self.private_pool
        if self.run_peak is not None:
            yield "run_peak_bytes", {}, self.run_peak
        if self.time_to_limit is not None:
            yield "time_to_limit_seconds", {}, self.time_to_limit
        if self.plan is not None:
            yield "plan_bytes", {"category": "weights", "component": "", "dtype": "", "moment": "peak"}, self.plan
        held = {"weights": self.weights, "unattributed": self.unattributed, "comm_buffers": self.comm}
        for moment in ("step_end", "peak"):
            for category, nbytes in held.items():
                if nbytes:
                    labels = {"category": category, "component": "", "dtype": "", "moment": moment}
                    yield "memory_bytes", labels, nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One scrape of what memtrace's own exporter writes of a snapshot; its times are moved to `at`."""

    at: float
    snapshot: Snapshot
    instance: str = "a:0"

    def target(self) -> Labels:
        """Returns the labels of the target."""
        return {"instance": self.instance}

    def samples(self) -> Iterator[Sample]:
        """Yields all samples of the scrape."""
        yield "up", {}, 1.0
        for line in render_text(self.snapshot).splitlines():
            if not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                name, labels = series.removesuffix("}").split("{")
                moved = self.at if name.endswith("timestamp_seconds") else float(value)
                yield name, dict(re.findall(r'(\w+)="(.*?)"', labels)), moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A story, and the warnings and critical alerts that it must raise; none, where it is a healthy one."""

    name: str
    tells: Story
    raises: frozenset[str] = frozenset()
    minutes: int = 120
    marked: bool = True
    """Whether Prometheus marks the end of a series; it does not where it was away meanwhile."""

    @property
    def job(self) -> str:
        """The job under which it is scraped."""
        return re.sub(r"\W+", "-", self.name).strip("-").lower()

    def series(self) -> dict[str, str]:
        """Returns each series in promtool's notation."""
        count = self.minutes * 60 // INTERVAL + 1
        columns: dict[str, list[str]] = defaultdict(lambda: [ABSENT] * count)
        for index in range(count):
            for scrape in self.tells(index * INTERVAL):
                target = {"job": self.job, **scrape.target()}
                for name, labels, value in scrape.samples():
                    text = ",".join(f'{label}="{text}"' for label, text in (target | labels).items())
                    columns[f"{name}{{{text}}}"][index] = repr(float(value))
        return {series: _notation(_ended(column) if self.marked else column) for series, column in columns.items()}


def _ended(column: Sequence[str]) -> Iterator[str]:
    """Yields a column with a mark of staleness after each stretch of samples, as Prometheus writes it."""
    before = ABSENT
    for value in column:
        yield STALE if value == ABSENT and before not in (ABSENT, STALE) else value
        before = value
    if before != ABSENT:
        yield STALE


def _notation(column: Iterable[str]) -> str:
    parts = []
    for value, equal in groupby(column):
        more = sum(1 for _ in equal) - 1
        parts.append(value if value == STALE or not more else f"{value}x{more if value != ABSENT else more + 1}")
    return " ".join(parts)


def judge(scenarios: Sequence[Scenario], directory: Path, *, every: int = 60) -> dict[str, set[str]]:
    """Returns the warnings and critical alerts that fire, by the name of the scenario; promtool runs once for all.

    Args:
        scenarios: what is judged.
        directory: where promtool finds its file.
        every: seconds between two evaluations of the rules; a minute is four times as quick as an evaluation a scrape.
    """
    minutes = max(scenario.minutes for scenario in scenarios)
    alerts = f'ALERTS{{alertstate="firing",severity=~"{PAGE_OR_TICKET}"}}'
    fired = f"max by (job, alertname) (max_over_time({alerts}[{minutes}m]))"
    found: dict[str, set[str]] = {scenario.job: set() for scenario in scenarios}
    for labels, _ in evaluated(scenarios, [fired], minutes, directory, every=every)[fired]:
        found[labels["job"]].add(labels["alertname"])
    return {scenario.name: found[scenario.job] for scenario in scenarios}


def evaluated(
    scenarios: Sequence[Scenario],
    expressions: Sequence[str],
    minute: int,
    directory: Path,
    *,
    every: int = 60,
    more_rules: Sequence[Path] = (),
) -> dict[str, list[tuple[Labels, float]]]:
    """Returns what expressions give at some minute of these histories, with the shipped rules run since the first one.

    Rules of other files run beside them. promtool is told to expect what no expression gives, and says what it has got
    instead.
    """
    files = ", ".join(map(str, (RULES, *more_rules)))
    lines = [f"rule_files: [{files}]", f"evaluation_interval: {every}s", "tests:", f"  - interval: {INTERVAL}s"]
    lines.append("    input_series:")
    for scenario in scenarios:
        lines += [f"      - {{series: '{name}', values: '{values}'}}" for name, values in scenario.series().items()]
    lines.append("    promql_expr_test:")
    for expression in expressions:
        asked = f"expr: {json.dumps(expression)}, eval_time: {minute}m"
        lines.append(f"      - {{{asked}, exp_samples: [{{labels: 'nothing', value: 1}}]}}")
    path = directory / "scenarios.yml"
    path.write_text("\n".join(lines) + "\n")
    result = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    text = result.stdout + result.stderr
    answers = [line.partition("got:")[2] for line in text.splitlines() if "got:" in line]
    assert len(answers) == len(expressions), text[:2000]
    return {
        expression: [
            ({"__name__": name} | dict(_LABEL.findall(labels)) if name else dict(_LABEL.findall(labels)), float(value))
            for name, labels, value in _SAMPLE.findall(answer)
        ]
        for expression, answer in zip(expressions, answers, strict=True)
    }


def ranks(scrape: Scrape, count: int, *, world: int | None = None, host: str = "a") -> Iterator[Scrape]:
    """Yields the scrapes of so many ranks that are all like this one."""
    for rank in range(count):
        yield replace(scrape, rank=rank, instance=f"{host}:{rank}", world=count if world is None else world)

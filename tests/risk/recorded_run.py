"""A run with lengths that vary, as it was scraped on an H200, and what replays it through the code of a live run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from records import breakdown

from memtrace.exporters.prometheus import render_text
from memtrace.record.breakdown import AllocatorReading, BatchShape, DeviceReading, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.snapshot import Snapshot
from memtrace.sources.devices.sampler import DeviceSampler

ROOT = Path(__file__).parents[2]
RUN = json.loads((ROOT / "tests" / "fixtures" / "gpu" / "variable-lengths.json").read_text())
LIMIT: int = RUN["limit_bytes"]
GB = 10**9


class Driver:
    """A device that says what it is told to say."""

    says = DeviceReading()

    def read(self) -> DeviceReading:
        return self.says

    def close(self) -> None:
        """Nothing is held."""


class Run:
    """One run whose device is read when the test says so: what the sampling thread does, without a clock."""

    def __init__(self) -> None:
        self.driver, self.now = Driver(), 0.0
        self.sampler = DeviceSampler(lambda: self.driver, period_seconds=0, clock=lambda: self.now)
        self.sampler.start()
        self._newest: DeviceReading | None = None
        self._noted = (0, 0)

    def sample(self, **says: Any) -> None:
        """The driver is asked."""
        self.driver.says = DeviceReading(**says)
        self.sampler.reading()

    def note(self, reserved: int, allocated: int) -> AllocatorReading:
        """The allocator is asked, on the training thread."""
        moved, known = self._noted
        self._noted = (moved + (reserved != known), reserved)
        reading = AllocatorReading(
            allocated_bytes=allocated, reserved_bytes=reserved, device_allocations=self._noted[0], allocations=1
        )
        self.sampler.note(reading)
        return reading

    def newest(self) -> DeviceReading:
        """What the end of a step and a scrape see, without asking the driver anew."""
        run = self.sampler._run
        assert run is not None
        return run.pairs.complete(self.driver.says)


def record_of(scrape: dict[str, int], allocator: AllocatorReading, device: DeviceReading) -> StepRecord:
    """A traced step with the peak and the batch that were scraped."""
    weights = EntryKey(Category.WEIGHTS, "trainable", "float32")
    persistent = {weights: scrape["allocated_bytes"]}
    passing = EntryKey(Category.ACTIVATIONS, "", "bfloat16")
    peak = persistent | {passing: scrape["peak_bytes"] - scrape["allocated_bytes"]}
    return StepRecord(
        step=scrape["steps"],
        rank=0,
        device="cuda:0",
        traced=True,
        unix_seconds=scrape["unix_seconds"],
        self_seconds=0.0001,
        step_seconds=0.1,
        batch=BatchShape(shape=(4, 2), tokens=scrape["tokens"], largest_micro_batch_tokens=scrape["tokens"]),
        moments={
            Moment.STEP_END: breakdown(Moment.STEP_END, persistent),
            Moment.PEAK: breakdown(Moment.PEAK, peak),
        },
        allocator=allocator,
        device_memory=device,
    )


def assert_no_alert(states: Sequence[Snapshot], tmp_path: Path) -> None:
    """Lets promtool go through all alerts at each state, which are a minute apart."""
    columns: dict[str, list[str]] = {}
    for index, state in enumerate(states):
        for line in render_text(state).splitlines():
            if not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                value = str(index * 60) if "timestamp_seconds" in series else value  # promtool's time begins at 0
                columns.setdefault(series, ["_"] * len(states))[index] = value
    rules = ROOT / "integrations" / "prometheus" / "memtrace.rules.yml"
    alerts = [
        rule["alert"]
        for group in yaml.safe_load(rules.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    target = 'job="train",instance="node:1",'
    case = {
        "interval": "1m",
        "input_series": [
            {"series": series.replace("{", "{" + target, 1), "values": " ".join(values)}
            for series, values in columns.items()
        ],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}
            for alert in alerts
            for minute in range(len(states))
        ],
    }
    path = tmp_path / "silent.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [case]}))
    result = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

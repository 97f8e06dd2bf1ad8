"""Thresholds that a run can override by its name: each of them, and what the alerts then do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from histories import GB, Scenario, Scrape, evaluated
from promql import rules

ALL = {
    rule["record"]: float(rule["expr"][len("vector(") : -1]) for rule in rules() if rule["expr"].startswith("vector(")
}
"""The shipped thresholds."""
REMEMBERED = "memtrace_threshold:remembered:seconds"
"""The one that is not a run's: the rules remember all runs for the same time."""
OWN = {name: value * 1.5 for name, value in ALL.items() if name != REMEMBERED}
"""What the run `own` sets instead."""
MINUTES = 40


def of_runs(name: str) -> str:
    """Returns the record that has a threshold for each run."""
    return re.sub(r"^memtrace_threshold:(\w+):\w+$", r"run:memtrace_\1:threshold", name)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rules as docs/operations.md tells an operator to add them: the same names, with that of a run."""
    path = tmp_path_factory.mktemp("own") / "own.rules.yml"
    added = [{"record": name, "expr": f"vector({value})", "labels": {"run": "own"}} for name, value in OWN.items()]
    added.append({"record": next(iter(OWN)), "expr": "vector(0.02)", "labels": {"run": "tight"}})
    path.write_text(yaml.safe_dump({"groups": [{"name": "own", "rules": added}]}))
    return path


STORY = Scenario(
    name="two runs",
    tells=lambda at: [
        Scrape(at=at, run="own"),
        Scrape(at=at, run="other", instance="b:0"),
        Scrape(at=at, run="tight", instance="c:0", peak=77.6 * GB),
        Scrape(at=at, run="as tight", instance="d:0", peak=77.6 * GB),
    ],
    minutes=MINUTES,
)


def test_each_threshold_can_be_a_run_s_own(own: Path, tmp_path: Path) -> None:
    """The run that sets them has its own ones, another one those of all; no threshold is left out."""
    assert next(iter(OWN)) == "memtrace_threshold:headroom_low:ratio"
    asked = [f'{of_runs(name)}{{run=~"own|other"}}' for name in OWN]
    found = evaluated([STORY], asked, MINUTES, tmp_path, more_rules=[own])
    for name, expression in zip(OWN, asked, strict=True):
        values = {labels["run"]: value for labels, value in found[expression]}
        assert values == pytest.approx({"own": OWN[name], "other": ALL[name]}), name


def test_alerts_take_the_run_s_own(own: Path, tmp_path: Path) -> None:
    """Of two runs at 97 % the one that allows itself 2 % stays silent."""
    alerts = 'ALERTS{alertstate="firing"}'
    fired = evaluated([STORY], [alerts], MINUTES, tmp_path, more_rules=[own])[alerts]
    assert {(labels["alertname"], labels["run"]) for labels, _ in fired} == {("MemtraceHeadroomLow", "as tight")}

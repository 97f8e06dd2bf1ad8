"""The page of all runs: each state in words, whatever ended or vanished, with the alerts that fire; as drawn."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from histories import GB, Scenario, Scrape, evaluated, ranks
from remote_write import INTERVAL, RECEIVER, labels_of, with_ends, write
from servers import ask, prometheus
from test_dashboards import GRAFANA, Drawing, draw, panels

MINUTE = 60
END, SEEN = 30 * MINUTE, 40
"""When runs end, in seconds, and the minute at which the page is looked at."""
FLEET = GRAFANA / "dashboards" / "memtrace-fleet.json"
RECORDED = '{__name__=~"rank:memtrace_(ended|gone).*|ALERTS"}'
"""What the page reads of the rules."""


class Row(NamedTuple):
    """What the page must say of a run."""

    state: str
    alerts: frozenset[str] = frozenset()
    seen: int | None = None
    expected: int | None = None


EXPECTED = {
    ("chat", "1"): Row("running", seen=4, expected=4),
    ("long-context", "2"): Row("running", frozenset({"HeadroomLow", "OomPredicted"}), 1, 1),
    ("finished", "3"): Row("ok"),
    ("broken", "4"): Row("exception", frozenset({"RunFailed"})),
    ("broken", "5"): Row("running", seen=1, expected=1),
    ("too-large", "6"): Row("out of memory", frozenset({"OutOfMemory"})),
    ("preempted", "7"): Row("signal"),
    ("killed", "8"): Row("gone", frozenset({"TrainerGone", "RankMissing"}), 7, 8),
    ("still-loading", "9"): Row("running", seen=1, expected=1),
}
"""By name and launch of each run."""


def told(at: int) -> Iterable[Scrape]:
    """One scrape of all runs."""

    def one(host: str, run: str, run_id: str, **says: float | str | None) -> Scrape:
        return Scrape(at=at, instance=f"{host}:16368", run=run, run_id=run_id, **says)  # type: ignore[arg-type]

    def ending(host: str, run: str, run_id: str, state: str, **says: float) -> Iterator[Scrape]:
        if at < END + INTERVAL:
            yield one(host, run, run_id, state="running" if at < END else state, last_step=min(at, END), **says)

    yield from ranks(one("n1", "chat", "1", risk=0.12, peak=52 * GB), 4, host="n1")
    yield one("n2", "long-context", "2", risk=0.96, peak=77.8 * GB)
    yield from ending("n3", "finished", "3", "ok", peak=60 * GB)
    yield from ending("n4", "broken", "4", "exception")
    if at > END + MINUTE:
        yield one("n4", "broken", "5", started=END + MINUTE, risk=0.03)
    yield from ending("n5", "too-large", "6", "out_of_memory", peak=74 * GB, risk=0.7)
    yield from ending("n6", "preempted", "7", "signal")
    for scrape in ranks(Scrape(at=at, run="killed", run_id="8", peak=44 * GB), 8, host="n7"):
        yield replace(scrape, answers=scrape.rank != 3 or at < END)
    yield one("n8", "still-loading", "9", last_step=float("nan"), steps=0, started=END)


STORY = Scenario(name="training", tells=told, minutes=SEEN)


@contextmanager
def all_runs(directory: Path) -> Iterator[tuple[str, float]]:
    """A real Prometheus with these runs as scraped and as the rules have recorded them; and the moment of the page."""
    begin = time.time() - SEEN * MINUTE - 10
    series: dict[tuple[tuple[str, str], ...], dict[float, float]] = {}
    for at in range(0, SEEN * MINUTE + 1, INTERVAL):
        for scrape in told(at):
            for name, labels, value in scrape.samples():
                moved = value + begin if name.endswith("timestamp_seconds") else value
                of = labels_of(name, {"job": "training", **scrape.target(), **labels})
                series.setdefault(of, {})[begin + at] = moved
    now = begin + SEEN * MINUTE
    written = {labels: [s for s in with_ends(samples) if s[0] <= now] for labels, samples in series.items()}
    for labels, value in evaluated([STORY], [RECORDED], SEEN, directory)[RECORDED]:
        name = labels["__name__"]
        moved = value + begin if name.endswith("timestamp_seconds") else value
        written[labels_of(name, {key: text for key, text in labels.items() if key != "__name__"})] = [(now, moved)]
    with prometheus(directory, options=[RECEIVER]) as url:
        write(url, written)
        yield url, now


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float]]:
    """These runs."""
    with all_runs(tmp_path_factory.mktemp("fleet")) as found:
        yield found


@pytest.fixture(scope="module")
def drawn(fleet: tuple[str, float], tmp_path_factory: pytest.TempPathFactory) -> Drawing:
    """The page as drawn."""
    return draw(FLEET, fleet[0], tmp_path_factory.mktemp("drawn") / "fleet.png")


def test_each_run_has_its_state_and_its_ranks(fleet: tuple[str, float]) -> None:
    """How a run ended, that one of its ranks is gone, and that a rerun goes on, each in its own row."""
    url, now = fleet
    table = next(panel for panel in panels(FLEET) if panel["title"] == "Runs by risk")
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for target in table["targets"]:
        expression = target["expr"].replace("$job", ".+")
        for series in ask(url, "query", query=expression, time=f"{now}")["result"]:
            labels = series["metric"]
            assert set(labels) == {"job", "run", "run_id"}
            rows.setdefault((labels["run"], labels["run_id"]), {})[target["refId"]] = float(series["value"][1])
    texts = next(
        setting["value"][0]["options"]
        for override in table["fieldConfig"]["overrides"]
        for setting in override["properties"]
        if setting["id"] == "mappings"
    )
    assert {run: texts[f"{row['A']:.0f}"]["text"] for run, row in rows.items()} == {
        run: row.state for run, row in EXPECTED.items()
    }
    assert {run: (row.get("E"), row.get("F")) for run, row in rows.items()} == {
        run: (row.seen, row.expected) for run, row in EXPECTED.items()
    }
    assert {run: row.get("G", 0) > 0 for run, row in rows.items()} == {
        run: bool(row.alerts) for run, row in EXPECTED.items()
    }


def test_firing_alerts_are_those_of_each_run(fleet: tuple[str, float]) -> None:
    """The list has what fires, with the run that it is about."""
    url, now = fleet
    listed = next(panel for panel in panels(FLEET) if panel["title"] == "Firing alerts")
    (target,) = listed["targets"]
    found: dict[tuple[str, str], set[str]] = {run: set() for run in EXPECTED}
    for series in ask(url, "query", query=target["expr"].replace("$job", ".+"), time=f"{now}")["result"]:
        labels = series["metric"]
        found[labels["run"], labels["run_id"]].add(labels["alertname"].removeprefix("Memtrace"))
    assert found == {run: set(row.alerts) for run, row in EXPECTED.items()}


def test_the_page_is_drawn_with_the_words(drawn: Drawing) -> None:
    """No query fails; each state is there in words, and each run."""
    assert drawn.errors == []
    for run, row in EXPECTED.items():
        assert run[0] in drawn.text
        assert row.state in drawn.text
        assert all(f"Memtrace{alert}" in drawn.text for alert in row.alerts)


def test_runs_and_alerts_lead_on(drawn: Drawing) -> None:
    """A run leads to its dashboard, with job, name and launch; an alert to the list that has its words and runbook."""
    runs = "\n".join(link for link in drawn.links if link.startswith("/d/memtrace-run"))
    assert len(re.findall("/d/memtrace-run", runs)) >= len(EXPECTED)
    assert any(link.startswith("/alerting/list?search=") for link in drawn.links)


def test_an_empty_fleet_says_so(tmp_path: Path) -> None:
    """Where nothing is scraped, no panel is empty without a word."""
    with prometheus(tmp_path, options=[RECEIVER]) as url:
        series = labels_of("memtrace_run_info", {"job": "training", "instance": "a", "run": "over", "run_id": "1"})
        write(url, {series: [(time.time() - 2000, 1)]})
        drawn = draw(FLEET, url, tmp_path / "empty.png")
    assert drawn.errors == []
    assert "no run is scraped, and none has ended within the hour" in drawn.text
    assert "nothing fires" in drawn.text

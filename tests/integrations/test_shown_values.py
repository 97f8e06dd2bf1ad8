"""Every panel and annotation shows the chosen run's own log, value by value, whatever else has been on its ports."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from expected_panels import (
    COLUMNS,
    OVER_AN_INTERVAL,
    PANELS,
    RATES,
    SCRAPED_BEFORE,
    STATES,
    Life,
    Shown,
    last_step,
    risk,
    share,
)
from logged_runs import Run, scraped
from remote_write import INTERVAL, RECEIVER, labels_of, with_ends, write
from servers import ask, prometheus
from test_dashboards import GRAFANA, dashboard, panels

RUNS = (
    Run(job="training", name="first", run_id="1", host="a", ranks=2, scrapes=range(12)),
    Run(job="training", name="first", run_id="2", host="a", ranks=2, scrapes=range(12, 26), full=0.9),
    Run(job="training", name="second (2.1)", run_id="3", host="a", ranks=2, scrapes=range(28, 50), full=0.7),
    Run(job="training", name="second (2.1)", run_id="4", host="b", ranks=2, scrapes=range(20, 50)),
    Run(job="evaluation", name="second (2.1)", run_id="5", host="c", ranks=2, scrapes=range(24, 50)),
)
"""A run, a rerun of it on the same ports without a pause, another run there; two more of that one's name beside it."""
IDS = [f"{run.job} {run.name} {run.run_id}" for run in RUNS]
MARKS = {
    "Out of memory": lambda life: life.points[6 : 6 + 60 // INTERVAL],
    "Alerts": lambda life: life.points[-4:],
}
"""Where each annotation marks: a minute from the failed allocation of rank 1 on, and while alerts fire."""
ELSEWHERE = {"Retries and failures of the allocator", "Host memory in use"}
"""Panels with a test of their own."""


def first_scrape() -> float:
    """Returns when the first scrape was: the last one is a few minutes old."""
    return (time.time() // INTERVAL - 60) * INTERVAL - SCRAPED_BEFORE


@pytest.fixture(scope="module")
def begin() -> float:
    """When the first scrape was."""
    return first_scrape()


@contextmanager
def of_all_runs(begin: float, directory: Path) -> Iterator[str]:
    """A real Prometheus that has scraped all runs, the first one of them from `begin` on."""
    series = scraped(RUNS, begin)
    for number, host in enumerate("abc", 1):
        for name, value in (("MemAvailable", 100 - number), ("MemTotal", 100)):
            labels = labels_of(f"node_memory_{name}_bytes", {"job": "node", "instance": f"{host}:9100"})
            series[labels] = [(begin + INTERVAL * at, value) for at in range(50)]
    for run in RUNS:
        for alert in ("MemtraceHeadroomLow", "MemtraceRankMissing"):
            told = {"alertname": alert, "alertstate": "firing", "job": run.job, "run": run.name, "run_id": run.run_id}
            series[labels_of("ALERTS", told)] = with_ends({begin + INTERVAL * at: 1 for at in run.scrapes[-4:]})
    with prometheus(directory, options=[RECEIVER]) as url:
        write(url, series)
        yield url


@pytest.fixture(scope="module")
def history(begin: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """All runs."""
    with of_all_runs(begin, tmp_path_factory.mktemp("shown")) as url:
        yield url


@pytest.fixture(params=RUNS, ids=IDS, scope="module")
def life(request: pytest.FixtureRequest, begin: float) -> Life:
    """Each run in turn."""
    return Life(run=request.param, log=request.param.log(begin), begin=begin)


def filled(expression: str, run: Run, *, interval: int = INTERVAL, **variables: str) -> str:
    """Returns an expression as Grafana asks it where this run is chosen, and a quarter of an hour is shown."""
    values = {"job": ".+", "run": run.name, "run_id": run.run_id, "instance": ".+", "rank": ".+", "__range": "900s"}
    values |= {**variables, "__interval": f"{interval}s", "__interval_ms": f"{interval}000"}
    values |= {"__rate_interval": f"{max(interval + INTERVAL, 4 * INTERVAL)}s"}
    return re.sub(r"\$([a-z_]+)", lambda match: values[match[1]], expression)


def with_fullest(url: str, run: Run, points: Iterable[float]) -> dict[str, str]:
    """Returns the value of the variable that names the fullest rank's instance, as Grafana finds it over this time."""
    variables = dashboard(GRAFANA / "dashboards" / "memtrace-run.json")["templating"]["list"]
    query = next(v["query"]["query"] for v in variables if v["name"] == "fullest")
    expression = filled(query.removeprefix("query_result(")[:-1], run)
    (found,) = ask(url, "query", query=expression, time=f"{max(points)}")["result"]
    return {"fullest": found["metric"]["instance"]}


def legend(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Returns the name that a series has in a graph; in a table, its labels beside that of the query."""
    written = re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], target["legendFormat"])
    beside = [labels[name] for name in sorted(labels)] if target.get("format") == "table" else []
    return " ".join([written, *beside]).strip()


def shown(url: str, panel: Mapping[str, Any], run: Run, points: Iterable[float]) -> dict[float, Shown]:
    """Returns what a panel shows at these points in time."""
    ordered = sorted(points)
    found: dict[float, Shown] = {at: {} for at in ordered}
    hidden = with_fullest(url, run, ordered)
    for target in panel["targets"]:
        expression = filled(target["expr"], run, **hidden)
        if target.get("instant"):
            answers = [ask(url, "query", query=expression, time=f"{ordered[-1]}")["result"]]
        else:
            span = {"start": f"{ordered[0]}", "end": f"{ordered[-1]}", "step": f"{INTERVAL}"}
            answers = [ask(url, "query_range", query=expression, **span)["result"]]
        for series in (one for answer in answers for one in answer):
            for at, value in series.get("values") or [series["value"]]:
                found[at][legend(target, series["metric"])] = float(value)
    return {at: values for at, values in found.items() if values}


@cache
def of_a_run() -> dict[str, dict[str, Any]]:
    pages = ("memtrace-run", "memtrace-ranks")
    return {panel["title"]: panel for page in pages for panel in panels(GRAFANA / "dashboards" / f"{page}.json")}


def test_every_panel_is_held_against_the_log() -> None:
    """No panel of a run is left out."""
    assert set(of_a_run()) == set(PANELS) | ELSEWHERE


def test_the_runs_can_be_mistaken(begin: float) -> None:
    """Runs on the same ports have different ranks as their fullest, so that the wrong run's would show."""
    lives = [Life(run=run, log=run.log(begin), begin=begin) for run in RUNS[:3]]
    assert len({life.fullest(life.points[-1]).identity.rank for life in lives}) == 2


@pytest.mark.parametrize("title", PANELS)
def test_panel_shows_the_log_of_the_chosen_run(title: str, life: Life, history: str) -> None:
    """At each point in time exactly what the run's own ranks have said; nothing where it was not there."""
    panel = of_a_run()[title]
    all_points = [life.begin + SCRAPED_BEFORE + INTERVAL * number for number in range(-2, 52)]
    if panel["targets"][0].get("instant"):
        expected = {life.points[-1]: PANELS[title](life, life.points[-1])}
        found = shown(history, panel, life.run, all_points[: all_points.index(life.points[-1]) + 1])
    else:
        expected = {at: PANELS[title](life, at) for at in life.points}
        found = shown(history, panel, life.run, all_points)
    if title in OVER_AN_INTERVAL:
        found.pop(life.points[-1] + INTERVAL, None)
    if title in RATES:
        early = life.points[: 60 // INTERVAL]
        for at in early:
            slower, whole = found.pop(at, {}), expected.pop(at)
            assert all(value <= whole[name] for name, value in slower.items())
    assert found == {at: pytest.approx(values, rel=1e-6, abs=2e-3) for at, values in expected.items()}


@pytest.mark.parametrize("page", ["memtrace-run", "memtrace-ranks"])
def test_annotations_mark_the_chosen_run(page: str, life: Life, history: str) -> None:
    """Failed allocations and alerts of other runs, also on the same ports, are no marks."""
    found = dashboard(GRAFANA / "dashboards" / f"{page}.json")["annotations"]["list"]
    span = {
        "start": f"{life.begin + SCRAPED_BEFORE}",
        "end": f"{life.begin + 900 + SCRAPED_BEFORE}",
        "step": f"{INTERVAL}",
    }
    marks = {
        annotation["name"]: {
            at
            for series in ask(history, "query_range", query=filled(annotation["expr"], life.run), **span)["result"]
            for at, _ in series["values"]
        }
        for annotation in found
    }
    assert marks == {name: set(marked(life)) for name, marked in MARKS.items()}


def test_the_newest_run_and_launch_are_the_default(history: str, begin: float) -> None:
    """The first value that a variable offers, which Grafana takes where nothing is chosen, began last."""
    variables = {v["name"]: v for v in dashboard(GRAFANA / "dashboards" / "memtrace-run.json")["templating"]["list"]}
    now = begin + 49 * INTERVAL + SCRAPED_BEFORE
    for name, newest in (("run", "second (2.1)"), ("run_id", "3")):
        query = variables[name]["query"]["query"].removeprefix("query_result(")[:-1]
        assert ask(history, "query", query=filled(query, RUNS[2]), time=f"{now}")["result"][0]["metric"][name] == newest


def test_retries_and_failures_are_counted_once(life: Life, history: str) -> None:
    """In columns of a minute all add up to what the chosen run's counters have risen by."""
    panel = of_a_run()["Retries and failures of the allocator"]
    begin = (life.begin + SCRAPED_BEFORE) // 60 * 60 - 60
    span = {"start": f"{begin}", "end": f"{begin + 1020}", "step": "60"}
    counted = []
    for target in panel["targets"]:
        answer = ask(history, "query_range", query=filled(target["expr"], life.run, interval=60), **span)["result"]
        counted.append(sum(float(value) for series in answer for _, value in series["values"]))
    first, last = life.ranks(life.points[0]), life.ranks(life.points[-1])
    assert counted == [
        sum(last[rank].totals.retries - first[rank].totals.retries for rank in first),
        sum(last[rank].totals.ooms - first[rank].totals.ooms for rank in first),
    ]


def test_host_memory_is_of_the_hosts_of_the_run(life: Life, history: str) -> None:
    """What node_exporter says of other hosts is not shown."""
    found = shown(history, of_a_run()["Host memory in use"], life.run, life.points)
    used = pytest.approx("abc".index(life.run.host) / 100 + 0.01)
    assert found == {at: {life.run.host: used} for at in life.points}


def test_the_fleet_shows_each_run_as_it_is(life: Life, history: str) -> None:
    """Each column of the table of all runs, and its curves, at each of the run's scrapes."""
    shown_of_all = {panel["title"]: panel for panel in panels(GRAFANA / "dashboards" / "memtrace-fleet.json")}
    at = life.points[-1]
    row: dict[str, float] = {}
    for column, target in zip(COLUMNS, shown_of_all["Runs by risk"]["targets"], strict=True):
        answer = ask(history, "query", query=filled(target["expr"], life.run), time=f"{at}")["result"]
        (value,) = (float(s["value"][1]) for s in answer if s["metric"]["run_id"] == life.run.run_id)
        row[column] = value
    assert row == pytest.approx(
        {
            "state": [*STATES].index("running") + 1,
            "risk": max(life.each(risk, at)),
            "headroom": 1 - max(life.each(share, at)),
            "since the last step": at - min(life.each(last_step, at)),
            "seen": life.run.ranks,
            "expected": life.run.ranks + 1,
            "firing": 2,
        },
        abs=2e-3,
    )
    for title, figure in (("Headroom at the peak", lambda said: 1 - share(said)), ("Out-of-memory risk", risk)):
        worst = min if title.startswith("Headroom") else max
        found = shown(history, shown_of_all[title], life.run, life.points)
        name = f"{life.run.name} {life.run.run_id}"
        assert {at: values[name] for at, values in found.items()} == pytest.approx(
            {at: worst(life.each(figure, at)) for at in life.points}
        )


def test_of_ranks_that_are_equally_full_the_first_is_chosen(tmp_path: Path) -> None:
    """The same one each time, so that the panels of a page and its next refresh agree."""
    run, now = RUNS[0], time.time() // INTERVAL * INTERVAL
    series = {}
    for rank in range(8):
        target = {"job": run.job, "instance": run.instance(rank), "rank": str(rank)}
        named = {"run": run.name, "run_id": run.run_id}
        for name, labels, value in (("run_info", named, 1), ("step_peak_bytes", {}, 10 - (rank == 0))):
            samples = [(now - INTERVAL * ago, float(value)) for ago in range(9, -1, -1)]
            series[labels_of(f"memtrace_{name}", target | labels)] = samples
    with prometheus(tmp_path, options=[RECEIVER]) as url:
        write(url, series)
        found = {with_fullest(url, run, [now])["fullest"] for _ in range(20)}
    assert found == {run.instance(1)}

"""Every panel and annotation shows the chosen run's own log, value by value, whatever else has been on its ports."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from logged_runs import SELF_SHARE, SLOWED_SHARE, STEPS_A_SCRAPE, Log, Run, scraped
from remote_write import INTERVAL, RECEIVER, labels_of, with_ends, write
from servers import ask, prometheus
from test_dashboards import GRAFANA, dashboard, panels

from memtrace.breakdown import AllocatorReading, DeviceReading
from memtrace.categories import Moment
from memtrace.risk_reading import PeakForecast, RiskReading
from memtrace.snapshot import Snapshot

RUNS = (
    Run(job="training", name="first", run_id="1", host="a", ranks=2, scrapes=range(12)),
    Run(job="training", name="first", run_id="2", host="a", ranks=2, scrapes=range(12, 26), full=0.9),
    Run(job="training", name="second (2.1)", run_id="3", host="a", ranks=2, scrapes=range(28, 50), full=0.7),
    Run(job="training", name="second (2.1)", run_id="4", host="b", ranks=2, scrapes=range(20, 50)),
    Run(job="evaluation", name="second (2.1)", run_id="5", host="c", ranks=2, scrapes=range(24, 50)),
)
"""A run, a rerun of it on the same ports without a pause, another run there; two more of that one's name beside it."""
IDS = [f"{run.job} {run.name} {run.run_id}" for run in RUNS]
SCRAPED_BEFORE = 4
"""Seconds from a scrape to the next point in time at which a dashboard asks."""
Shown = dict[str, float]
"""Values by legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What a run has said, by the points in time at which a dashboard asks."""

    run: Run
    log: Log
    begin: float

    @property
    def points(self) -> list[float]:
        """Those between its first scrape and its last."""
        return [self.begin + SCRAPED_BEFORE + INTERVAL * number for number in self.run.scrapes]

    def ranks(self, at: float) -> dict[int, Snapshot]:
        """What each rank has said last, at one of the points."""
        return {rank: snapshots[at - SCRAPED_BEFORE] for rank, snapshots in self.log.items()}

    def each(self, figure: Callable[[Snapshot], float], at: float) -> list[float]:
        """A figure of each rank."""
        return [figure(snapshot) for snapshot in self.ranks(at).values()]

    def lately(self, figure: Callable[[Snapshot], float], at: float) -> list[list[float]]:
        """A figure of each rank, at this point and at the one before: the interval of a graph has both."""
        points = [point for point in (at - INTERVAL, at) if point in self.points]
        return [list(told) for told in zip(*(self.each(figure, point) for point in points), strict=True)]

    def fullest(self, at: float) -> Snapshot:
        """What that rank says that has had the highest peak of all."""
        rank = max(self.log, key=lambda rank: max(peak(said) for said in self.log[rank].values()))
        return self.ranks(at)[rank]


def peak(said: Snapshot) -> int:
    assert said.latest is not None
    return said.latest.moments[Moment.PEAK].total_bytes


def tokens(said: Snapshot) -> int:
    assert said.latest is not None
    assert said.latest.batch is not None
    return said.latest.batch.tokens


def last_step(said: Snapshot) -> float:
    assert said.latest is not None
    return said.latest.unix_seconds


def risks(said: Snapshot) -> RiskReading:
    assert said.risk is not None
    return said.risk


def risk(said: Snapshot) -> float:
    return risks(said).oom_risk_ratio or 0


def capacity(said: Snapshot) -> int:
    return risks(said).capacity_bytes or 0


def forecast(said: Snapshot) -> PeakForecast:
    found = risks(said).peak
    assert found is not None
    return found


def time_to_limit(said: Snapshot) -> float:
    growth = risks(said).growth
    assert growth is not None
    return growth.seconds_to_limit or 0


def allocator(said: Snapshot) -> AllocatorReading:
    assert said.latest is not None
    assert said.latest.allocator is not None
    return said.latest.allocator


def pools(said: Snapshot) -> int:
    return allocator(said).private_pool_bytes or 0


def device(said: Snapshot) -> DeviceReading:
    assert said.device is not None
    return said.device


def categories(said: Snapshot, moment: Moment) -> Shown:
    assert said.latest is not None
    return {category.value: size for category, size in said.latest.moments[moment].by_category().items()}


def by_rank(figure: Callable[[Snapshot], float | None]) -> Callable[[Life, float], Shown]:
    return lambda life, at: {f"rank {rank}": figure(said) or 0 for rank, said in life.ranks(at).items()}


def plan_and_peak(life: Life, at: float) -> Shown:
    said = life.fullest(at)
    measured, planned = (
        categories(said, Moment.PEAK),
        {c.value: n for c, n in said.plan[Moment.PEAK].by_category().items()},
    )
    for sizes in (measured, planned):
        sizes["total"] = sum(sizes.values())
    difference = {name: measured.get(name, 0) - planned.get(name, 0) for name in {*measured, *planned}}
    columns = {"planned": planned, "measured": measured, "difference": difference}
    return {f"{column} {name}": size for column, sizes in columns.items() for name, size in sizes.items()}


def parts_of_the_device(life: Life, at: float) -> Shown:
    said = life.fullest(at)
    read, told = device(said), allocator(said)
    return {
        "tensors": told.allocated_bytes,
        "allocator slack": told.slack_bytes,
        "private pools": pools(said),
        "outside torch": read.non_torch_bytes or 0,
        "other processes": read.other_processes_bytes or 0,
        "free": read.free_bytes or 0,
    }


def unused(life: Life, at: float) -> Shown:
    held = life.each(lambda said: allocator(said).reserved_bytes - pools(said), at)
    return {"unused": max(1 - max(peaks) / size for peaks, size in zip(life.lately(peak, at), held, strict=True))}


def behind(life: Life, at: float) -> Shown:
    ended = {rank: last_step(said) for rank, said in life.ranks(at).items()}
    return {f"rank {rank}": max(ended.values()) - when for rank, when in ended.items()}


def forecasts(life: Life, at: float) -> Shown:
    def expected(share: int) -> float:
        return max(life.each(lambda said: forecast(said).predicted_bytes + share * forecast(said).band_bytes, at))

    return {
        "peak of a step": max(map(max, life.lately(peak, at))),
        "expected": expected(0),
        "expected, upper": expected(1),
        "expected, lower": expected(-1),
        "capacity": min(life.each(capacity, at)),
    }


def share(said: Snapshot) -> float:
    return peak(said) / capacity(said)


PANELS: Mapping[str, Callable[[Life, float], Shown]] = {
    "Out-of-memory risk": lambda life, at: {"risk": max(life.each(risk, at))},
    "Headroom at the peak": lambda life, at: {"headroom": 1 - max(life.each(share, at))},
    "Peak of a step": lambda life, at: {"peak": max(map(max, life.lately(peak, at)))},
    "Forecast for the largest batch": lambda life, at: {
        "forecast": max(life.each(lambda said: forecast(said).predicted_bytes / capacity(said), at))
    },
    "Time until a leak fills the memory": lambda life, at: {"time left": min(life.each(time_to_limit, at))},
    "Ranks seen of expected": lambda life, at: {"seen": len(life.ranks(at)), "expected": life.run.ranks + 1},
    "Time since the last step": lambda life, at: {"since the last step": at - min(life.each(last_step, at))},
    "Steps an hour": lambda life, at: {"steps": STEPS_A_SCRAPE * int(life.run.run_id) * 3600 / INTERVAL},
    "Composition of the peak": lambda life, at: (
        categories(life.fullest(at), Moment.PEAK) | {"capacity": capacity(life.fullest(at))}
    ),
    "Plan against measured": plan_and_peak,
    "Headroom at the peak, and risk": lambda life, at: {
        "headroom": 1 - max(map(max, life.lately(share, at))),
        "risk": max(life.each(risk, at)),
    },
    "Forecast against capacity": forecasts,
    "Peak against tokens": lambda life, at: {
        "tokens of the largest micro batch": tokens(life.fullest(at)),
        "peak of a step": peak(life.fullest(at)),
    },
    "Memory that outlives steps": lambda life, at: categories(life.fullest(at), Moment.STEP_END),
    "Memory of the device": parts_of_the_device,
    "Fragmentation: reserved, but unused": unused,
    "Memory of each process": lambda life, at: (
        by_rank(lambda said: device(said).process_bytes)(life, at)
        | {"total": max(life.each(lambda said: device(said).total_bytes or 0, at))}
    ),
    "Power": by_rank(lambda said: device(said).power_watts),
    "Temperature": by_rank(lambda said: device(said).temperature_celsius),
    "Utilisation": by_rank(lambda said: device(said).utilization_ratio),
    "What memtrace costs": lambda life, at: {"share of time": (SELF_SHARE + SLOWED_SHARE) * int(life.run.run_id)},
    "Age of the last exact breakdown": lambda life, at: {"age": at - min(life.each(last_step, at))},
    "Peak over the ranks": lambda life, at: {
        "highest": max(map(max, life.lately(peak, at))),
        "median": median(life.each(peak, at)),
        "lowest": min(life.each(peak, at)),
        "capacity": min(life.each(capacity, at)),
    },
    "Ranks that lag behind": behind,
    "Fullest ranks": lambda life, at: {str(rank): share(said) for rank, said in life.ranks(at).items()},
    "Highest risks": lambda life, at: {str(rank): risk(said) for rank, said in life.ranks(at).items()},
    "Composition of each rank's peak": lambda life, at: {
        f"{category} {rank}": size
        for rank, said in life.ranks(at).items()
        for category, size in categories(said, Moment.PEAK).items()
    },
}
"""What each panel of a run must show of its log, by its title."""
COLUMNS = ("state", "risk", "headroom", "since the last step", "seen", "expected", "firing")
"""Those of the table of all runs, in the order of its queries."""
STATES = ("ok", "running", "signal", "exception", "out_of_memory", "gone")
RATES = {"Steps an hour", "What memtrace costs"}
"""Panels of rates, which begin with the second scrape and are whole after a minute."""
OVER_AN_INTERVAL = {
    "Peak of a step",
    "Headroom at the peak, and risk",
    "Forecast against capacity",
    "Fragmentation: reserved, but unused",
    "Peak over the ranks",
}
"""Panels of what is highest within an interval, which still has a value one point after the end."""
MARKS = {
    "Out of memory": lambda life: life.points[6 : 6 + 60 // INTERVAL],
    "Alerts": lambda life: life.points[-4:],
}
"""Where each annotation marks: a minute from the failed allocation of rank 1 on, and while alerts fire."""
ELSEWHERE = {"Retries and failures of the allocator", "Host memory in use"}
"""Panels with a test of their own."""


@pytest.fixture(scope="module")
def begin() -> float:
    """When the first scrape was."""
    return (time.time() // INTERVAL - 60) * INTERVAL - SCRAPED_BEFORE


@pytest.fixture(scope="module")
def history(begin: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that has scraped all runs."""
    series = scraped(RUNS, begin)
    for number, host in enumerate("abc", 1):
        for name, value in (("MemAvailable", 100 - number), ("MemTotal", 100)):
            labels = labels_of(f"node_memory_{name}_bytes", {"job": "node", "instance": f"{host}:9100"})
            series[labels] = [(begin + INTERVAL * at, value) for at in range(50)]
    for run in RUNS:
        for alert in ("MemtraceHeadroomLow", "MemtraceRankMissing"):
            told = {"alertname": alert, "alertstate": "firing", "job": run.job, "run": run.name, "run_id": run.run_id}
            series[labels_of("ALERTS", told)] = with_ends({begin + INTERVAL * at: 1 for at in run.scrapes[-4:]})
    with prometheus(tmp_path_factory.mktemp("shown"), options=[RECEIVER]) as url:
        write(url, series)
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

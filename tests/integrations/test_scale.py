"""1,024 ranks in one Prometheus: scrapes, rules and dashboards keep up. `make test-long` runs this."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import run
from threading import Thread
from urllib.request import urlopen

import pytest
from promql import ROOT, RULES
from recorded import open_metrics
from servers import ask, prometheus

from memtrace.record.metrics import MAX_SERIES

pytestmark = [pytest.mark.long, pytest.mark.timeout(900), pytest.mark.xdist_group("scale")]

DASHBOARDS = sorted((ROOT / "integrations" / "grafana" / "dashboards").glob("*.json"))
RANKS = 1024
TRAINING = '{job="training"}'
SCRAPE_SECONDS = 15
HISTORY_STEPS = 30
HISTORY_SECONDS = 3600
PLAIN_QUERY = f"max(memtrace_step_peak_bytes{TRAINING} and on (job, instance, rank) memtrace_run_info{TRAINING})"
"""One line of a graph over all ranks: the yardstick for the others. Work is counted in samples that a query reads, as
Prometheus counts them, and not in seconds: those are the machine's, and are printed."""
QUERY_IN_PLAIN_QUERIES = 20
"""The dearest one reads 16.5 times what the plain one does."""
RULES_IN_PLAIN_QUERIES = 120
"""All rules together read 88 times what the plain query does."""
CONFIG = """
global: {{scrape_interval: {interval}s, evaluation_interval: {interval}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: training
    file_sd_configs: [{{files: ["{directory}/targets-*.json"]}}]
  - job_name: prometheus
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def instance(rank: int) -> str:
    return f"node-{rank // 8}:{16368 + rank % 8}"


@cache
def exposition() -> tuple[str, ...]:
    """Returns the lines of one rank after each step of a recorded run, with `@R` and `@I` for rank and instance."""
    lines = list(open_metrics(1, HISTORY_STEPS, time.time() - SCRAPE_SECONDS, job="training"))[:-1]
    shared = [
        line.replace('rank="0"', 'rank="@R"').replace('instance="gpu-node-0:16368"', 'instance="@I"') for line in lines
    ]
    return tuple(line.replace('world_size="1"', f'world_size="{RANKS}"') for line in shared)


def backfilled(directory: Path) -> Path:
    """Writes an hour of all ranks as data of a Prometheus."""
    text, data = directory / "history.om", directory / "data"
    stretched = [_stretched(line) for line in exposition()]
    with text.open("w") as file:
        for rank in range(RANKS):
            file.writelines(line.replace("@R", str(rank)).replace("@I", instance(rank)) for line in stretched)
        file.write("# EOF\n")
    run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)], check=True, capture_output=True
    )
    text.unlink()
    return data


def _stretched(line: str) -> str:
    """Spreads the steps over the hour before the last one."""
    series, value, moment = line.rsplit(" ", 2)
    end = time.time() - SCRAPE_SECONDS
    age = (end - float(moment)) * HISTORY_SECONDS / (HISTORY_STEPS * 15)
    return f"{series} {value} {end - age:.3f}\n"


@contextmanager
def trainers(directory: Path) -> Iterator[None]:
    """Serves every rank at a path of its own, and writes the target files that say where."""
    newest = [line.rsplit(" ", 1)[0] for line in exposition()[-len(exposition()) // HISTORY_STEPS :]]
    text = "\n".join(re.sub(r'job="training",instance="@I",', "", line) for line in newest) + "\n"

    class Rank(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = text.replace("@R", self.path.removeprefix("/rank/")).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = RANKS
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """Says nothing of connections that Prometheus closes as it ends."""

    with Server(("127.0.0.1", 0), Rank) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        for node in range(RANKS // 8):
            targets = [
                {
                    "targets": [f"127.0.0.1:{http.server_port}"],
                    "labels": {"__metrics_path__": f"/rank/{rank}", "instance": instance(rank)},
                }
                for rank in range(node * 8, node * 8 + 8)
            ]
            (directory / f"targets-{node}.json").write_text(json.dumps(targets))
        try:
            yield
        finally:
            http.shutdown()
            thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A Prometheus with all ranks, after some scrapes and evaluations."""

    url: str

    def value(self, query: str) -> float:
        result = ask(self.url, "query", query=query)["result"]
        assert result, query
        return float(result[0]["value"][1])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    data = backfilled(directory)
    with trainers(directory):
        config = CONFIG.format(interval=SCRAPE_SECONDS, rules=RULES, directory=directory, port="{port}")
        with prometheus(directory, config, data=data) as url:
            found = Fleet(url=url)
            _after_evaluations(url, 4)
            yield found


def _after_evaluations(url: str, times: int) -> None:
    """Waits for so many evaluations of the rules, all ranks having been scraped before the last of them."""
    seen: set[str] = set()
    deadline = time.monotonic() + 60 + times * 2 * SCRAPE_SECONDS
    while len(seen) <= times:
        assert time.monotonic() < deadline
        seen.add(ask(url, "rules")["groups"][0]["lastEvaluation"])
        time.sleep(0.5)


def test_every_rank_is_scraped(fleet: Fleet) -> None:
    """All ranks are up, each with no more samples than it may have series."""
    assert fleet.value(f"sum(up{TRAINING})") == RANKS
    samples = fleet.value(f"max(scrape_samples_scraped{TRAINING})")
    print(f"samples a rank: {samples:.0f}")
    print(f"slowest scrape {fleet.value(f'max(scrape_duration_seconds{TRAINING})'):.3f} s")
    print(f"Prometheus takes {fleet.value('process_resident_memory_bytes') / 2**20:.0f} MiB")
    print(f"and {fleet.value('rate(process_cpu_seconds_total[1m])'):.2f} cores")
    assert samples <= MAX_SERIES


def test_rules_read_little(fleet: Fleet) -> None:
    """All rules together read, each time, at most so many times what the plain query reads at one instant."""
    group = ask(fleet.url, "rules")["groups"][0]
    now = time.time()
    plain = _read(fleet.url, PLAIN_QUERY, now, instant=True)
    read = sum(_read(fleet.url, rule["query"], now, instant=True) for rule in group["rules"])
    print(f"rules take {group['evaluationTime']:.2f} s and read {read / plain:.1f} times what the plain query does")
    assert read <= RULES_IN_PLAIN_QUERIES * plain


def test_alerts_see_all_ranks(fleet: Fleet) -> None:
    """The run is counted whole: nobody is missing, and no alert of memory fires."""
    assert fleet.value("run:memtrace_ranks:count") == RANKS
    firing = ask(fleet.url, "query", query='ALERTS{alertstate="firing"}')["result"]
    assert [alert["metric"]["alertname"] for alert in firing] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_queries_read_little(path: Path, fleet: Fleet) -> None:
    """Each query of a dashboard over the last hour, all ranks chosen, reads a bounded multiple of the plainest one.

    The variables are queries, too: the fullest rank is looked for among all.
    """
    now = time.time()
    plain = _read(fleet.url, PLAIN_QUERY, now)
    dear, ratios, slowest = [], [], 0.0
    dashboard = json.loads(path.read_text())
    variables = [
        {"expr": asked[1], "instant": True, "refId": variable["name"]}
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query" and (asked := re.fullmatch(r"query_result\((.*)\)", variable["query"]["query"]))
    ]
    for panel in (*dashboard["panels"], {"title": "variables", "targets": variables}):
        for target in panel.get("targets", []):
            begun = _cpu_seconds(fleet.url)
            read = _read(fleet.url, _with_all(target["expr"]), now, instant=bool(target.get("instant")))
            slowest = max(slowest, _cpu_seconds(fleet.url) - begun)
            ratios.append(read / plain)
            if read > QUERY_IN_PLAIN_QUERIES * plain:
                dear.append((panel["title"], target["refId"], round(read / plain, 1)))
    print(f"dearest query of {path.stem}: {max(ratios):.1f} times the plain one; slowest: {slowest:.2f} s of a core")
    assert dear == []


def _read(url: str, expression: str, now: float, *, instant: bool = False) -> int:
    """Returns how many samples a query reads, over the last hour or at one instant."""
    if instant:
        found = ask(url, "query", query=expression, time=str(now), stats="all")
    else:
        begin = str(now - HISTORY_SECONDS)
        found = ask(url, "query_range", query=expression, start=begin, end=str(now), step="15", stats="all")
    return int(found["stats"]["samples"]["totalQueryableSamples"])


def _cpu_seconds(url: str) -> float:
    """Returns how long Prometheus has worked, in seconds of one core; scrapes and rules that run meanwhile included."""
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        found = re.search(rb"^process_cpu_seconds_total (\S+)$", answer.read(), re.MULTILINE)
    assert found
    return float(found[1])


def _with_all(expression: str) -> str:
    values = {"job": ".+", "run": "llama-3-8b-chat", "run_id": ".+", "instance": ".+", "rank": ".+", "__range": "3600s"}
    values |= {"__rate_interval": "4m", "__interval": "15s", "__interval_ms": "15000", "fullest": instance(0)}
    return re.sub(r"\$([a-z_]+)", lambda match: values[match[1]], expression)

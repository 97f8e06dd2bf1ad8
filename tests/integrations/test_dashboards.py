"""The shipped dashboards: as built, as queried, and as drawn by Grafana's UI library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from browser import files, page
from promql import ROOT, unknown
from recorded import backfill
from servers import ask, prometheus

from memtrace.categories import COLOURS, Category

GRAFANA = ROOT / "integrations" / "grafana"
SHIPPED = sorted((GRAFANA / "dashboards").glob("*.json"))
BUNDLE = ROOT / ".cache" / "grafana-render" / "bundle"
DRAWN = """() => {
    const { panels, drawn, errors } = memtraceReport;
    return panels ? drawn >= panels : errors.length;
}"""
Drawing = tuple[list[str], dict[str, int]]
OF_RUN = GRAFANA / "dashboards" / "memtrace-run.json"
NAMES = [path.stem for path in SHIPPED]


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that holds the last hour of a recorded run of four ranks."""
    directory = tmp_path_factory.mktemp("history")
    data = backfill(directory, ranks=4, steps=236, end=time.time() - 10)
    with prometheus(directory, data=data) as url:
        yield url


def test_committed_dashboards_are_those_that_are_built(tmp_path: Path) -> None:
    """Built again, every dashboard is the committed one, byte for byte."""
    script = GRAFANA / "build_dashboards.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in SHIPPED]
    for path in SHIPPED:
        assert (tmp_path / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_expressions_use_what_exists(path: Path) -> None:
    """Every panel, annotation and variable uses only metrics and labels that are exported."""
    shown = dashboard(path)
    expressions = [target["expr"] for panel in panels(path) for target in panel["targets"]]
    expressions += [annotation["expr"] for annotation in shown["annotations"].get("list", [])]
    queries = [v["query"]["query"] for v in shown["templating"]["list"] if v["type"] == "query"]
    expressions += [re.sub(r"^label_values\((.*), \w+\)$|^query_result\((.*)\)$", r"\1\2", query) for query in queries]
    assert expressions
    assert [wrong for expression in expressions for wrong in unknown(expression)] == []


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_dashboard_keeps_the_rules_of_the_linter(path: Path) -> None:
    """What grafana/dashboard-linter asks for: sources by variable, words and units on panels, `.+` for all."""
    shown = dashboard(path)
    variables = {variable["name"]: variable for variable in shown["templating"]["list"]}
    fleet = path.stem == "memtrace-fleet"
    assert list(variables) == ["datasource", "job"] + ([] if fleet else ["run", "run_id", "instance", "rank"])
    for name in set(variables) - {"datasource", "run", "run_id"}:
        assert variables[name]["allValue"] == ".+"
        assert variables[name]["multi"]
    ids = [panel["id"] for panel in shown["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels(path):
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            if "rate(" in target["expr"] or "increase(" in target["expr"]:
                assert "$__rate_interval" in target["expr"]


def test_stack_has_the_order_and_colours_of_the_vocabulary() -> None:
    """The composition of the peak stacks all categories in their order, each in its one colour."""
    panel = next(p for p in panels(GRAFANA / "dashboards/memtrace-run.json") if p["title"] == "Composition of the peak")
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert legends == [*Category, "capacity"]
    colours = {
        override["matcher"]["options"]: setting["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
        for setting in override["properties"]
        if setting["id"] == "color"
    }
    assert {category: colours[category] for category in Category} == dict(COLOURS)


def panel_of_run(title: str) -> dict[str, Any]:
    return next(panel for panel in panels(GRAFANA / "dashboards" / "memtrace-run.json") if panel["title"] == title)


def test_a_click_on_the_device_leads_to_the_series_of_dcgm_exporter() -> None:
    """The link asks for the device by its UUID, which every series of the panel has as a label."""
    device = panel_of_run("The device")
    (link,) = device["fieldConfig"]["defaults"]["links"]
    address = urlsplit(link["url"])
    (pane,) = json.loads(parse_qs(address.query)["panes"][0]).values()
    (query,) = pane["queries"]
    assert address.path == "/explore"
    assert query["expr"] == 'DCGM_FI_DEV_FB_USED{UUID="${__field.labels.gpu_uuid}"}'
    assert all(target["expr"].startswith("max by (gpu_uuid) ") for target in device["targets"])


def test_failures_are_whole_counts(history: str) -> None:
    """Three retries of each rank and the one failure are counted once each, in columns of a minute."""
    panel = panel_of_run("Retries and failures of the allocator")
    assert panel["interval"] == "1m"
    counts, now = [], time.time()
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "75s").replace("$__interval_ms", "60000")
        expression = re.sub(r"\$\w+", ".+", expression)
        (series,) = ask(history, "query_range", query=expression, start=f"{now - 3540}", end=f"{now}", step="60")[
            "result"
        ]
        counts.append([float(value) for _, value in series["values"]])
    assert all(value == int(value) for found in counts for value in found)
    assert [sum(found) for found in counts] == [8, 1]


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_dashboard_is_drawn(path: Path, history: str, tmp_path: Path) -> None:
    """In Chromium no query fails, no variable stays, no panel is empty, no panel type is unknown.

    The annotations mark the failed allocation and the alert that the recorded run holds.
    """
    errors, marks = draw(path, history, tmp_path / f"{path.stem}.png")
    assert errors == []
    assert marks == ({} if path.stem == "memtrace-fleet" else {"Out of memory": 1, "Alerts": 1})
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 30_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "piechart"}, "unknown panel type piechart"),
        ({"targets": [{"refId": "A", "expr": "memtrace_no_such_metric"}]}, "no data"),
        ({"targets": [{"refId": "A", "expr": "sum(("}]}, "parse error"),
        ({"targets": [{"refId": "A", "expr": 'memtrace_up{job="$nobody"}'}]}, "unresolved variable $nobody"),
    ],
    ids=["unknown panel type", "empty panel", "broken query", "unresolved variable"],
)
def test_what_is_wrong_is_found(change: dict[str, Any], message: str, history: str, tmp_path: Path) -> None:
    """A dashboard with a fault of each kind does not pass."""
    broken = dashboard(OF_RUN)
    next(panel for panel in broken["panels"] if panel["type"] == "timeseries").update(change)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    errors, _ = draw(path, history, tmp_path / "broken.png")
    assert any(message in error for error in errors)


def test_several_ranks_can_be_chosen(history: str, tmp_path: Path) -> None:
    """A variable with several values becomes an alternation, and the dashboard is drawn for those."""
    errors, _ = draw(OF_RUN, history, tmp_path / "two.png", "&var-rank=1&var-rank=3")
    assert errors == []


def test_annotations_follow_the_choice(history: str, tmp_path: Path) -> None:
    """A failed allocation of another rank is no mark on the chosen ones."""
    _, marks = draw(OF_RUN, history, tmp_path / "other.png", "&var-rank=3")
    assert marks["Out of memory"] == 0


def shared_port(end: float) -> Iterator[str]:
    """Yields two runs that had one port, six minutes apart, one on another host, and the second one's namesake.

    Data that are written afterwards have no marks of staleness: a series counts as there for five minutes more.
    """
    for run, run_id, instance, begin, count, peak in (
        ("first", "1", "a:1", 64, 20, 10),
        ("second", "2", "a:1", 20, 20, 30),
        ("elsewhere", "3", "b:1", 64, 64, 50),
        ("second", "4", "c:1", 24, 24, 70),
    ):
        target = f'job="training",instance="{instance}"'
        for index in range(count):
            at = f"{end - 15 * (begin - index):.3f}"
            highest = peak + (index == 7)
            yield f'memtrace_run_info{{{target},rank="0",run="{run}",run_id="{run_id}",device="cuda:0"}} 1 {at}'
            series = {"step_peak_bytes": highest, "capacity_bytes": 100, "oom_risk_ratio": peak / 100}
            series |= {"ooms_total": peak, "allocator_retries_total": peak + index, "steps_total": peak + index}
            for name, value in series.items():
                yield f'memtrace_{name}{{{target},rank="0"}} {value} {at}'
            for moment in ("peak", "step_end"):
                labels = f'{target},rank="0",category="weights",component="",dtype="",moment="{moment}"'
                yield f"memtrace_memory_bytes{{{labels}}} {peak} {at}"
    yield "# EOF"


def test_panels_show_the_chosen_run_and_no_other(tmp_path: Path) -> None:
    """With a rerun on the same port and another run beside it, each value is one that the chosen run has said."""
    now = time.time()
    text, data = tmp_path / "runs.om", tmp_path / "data"
    lines = list(shared_port(now))
    text.write_text("\n".join(sorted(lines[:-1], key=lambda line: line.split(" ")[0])) + "\n# EOF\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)]
    subprocess.run(command, check=True, capture_output=True)
    values = {"__range": "3600s", "__rate_interval": "60s", "__interval": "15s", "__interval_ms": "15000"}
    with prometheus(tmp_path, data=data) as url:

        def shown(expression: str, run: str, run_id: str) -> set[float]:
            chosen = values | {"run": run, "run_id": run_id}
            filled = re.sub(r"\$(\w+)", lambda match: chosen.get(match[1], ".+"), expression)
            found = ask(url, "query_range", query=filled, start=f"{now - 1200}", end=f"{now}", step="15")["result"]
            return {float(value) for series in found for _, value in series["values"]}

        names = {p["title"]: [t["expr"] for t in p["targets"]] for p in panels(OF_RUN)}
        weights = [*Category].index(Category.WEIGHTS)
        for run, run_id, peak in (
            ("first", "1", 10),
            ("second", "2", 30),
            ("elsewhere", "3", 50),
            ("second", "4", 70),
        ):
            assert shown(names["Peak of a step"][0], run, run_id) == {peak, peak + 1}
            assert shown(names["Out-of-memory risk"][0], run, run_id) == {peak / 100}
            assert shown(names["Composition of the peak"][weights], run, run_id) == {peak}
            assert shown(names["What outlives steps"][weights], run, run_id) == {peak}
            assert shown(names["Peak against tokens"][1], run, run_id) == {peak, peak + 1}
            assert max(shown(names["Ranks seen"][0], run, run_id), default=1) == 1
            assert shown(names["Retries and failures of the allocator"][1], run, run_id) <= {0, peak}
        variables = {v["name"]: v for v in dashboard(OF_RUN)["templating"]["list"]}
        for name, newest in (("run", "second"), ("run_id", "2")):
            query = variables[name]["query"]["query"].removeprefix("query_result(")[:-1]
            expression = query.replace("$job", ".+").replace("$__range", "3600s").replace("$run", "second")
            offered = ask(url, "query", query=expression, time=f"{now - 16}")["result"]
            assert offered[0]["metric"][name] == newest


def draw(path: Path, prometheus_url: str, picture: Path, parameters: str = "") -> Drawing:
    """Draws a dashboard, keeps its picture, and returns all that was wrong and how much each annotation marks."""
    assert BUNDLE.is_dir(), "run `make grafana-render` first: it builds the page that draws dashboards"
    site = picture.with_suffix("")
    shutil.copytree(BUNDLE, site)
    shutil.copy(path, site / "dashboard.json")
    with files(site) as url, page() as (opened, wrong, _):
        opened.goto(f"{url}/index.html?dashboard=dashboard.json&prometheus={prometheus_url}{parameters}")
        opened.wait_for_function(DRAWN, timeout=120_000)
        opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        opened.screenshot(path=str(picture), full_page=True)
        report = opened.evaluate("() => memtraceReport")
    assert report["panels"]
    fonts = "/public/fonts/"  # of Grafana's server; its library does not ship them
    errors = [*report["errors"], *(text for text in wrong if fonts not in text)]
    return errors, report["annotations"]

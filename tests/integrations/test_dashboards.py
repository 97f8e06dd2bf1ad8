"""The shipped dashboards: as built, as queried, and as drawn by Grafana's UI library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from browser import files, page
from promql import ROOT, unknown
from recorded import backfill
from servers import prometheus

from memtrace.record.categories import COLOURS, Category

GRAFANA = ROOT / "integrations" / "grafana"
SHIPPED = sorted((GRAFANA / "dashboards").glob("*.json"))
BUNDLE = ROOT / ".cache" / "grafana-render" / "bundle"
DRAWN = """() => {
    const { panels, drawn, errors } = memtraceReport;
    return panels ? drawn >= panels : errors.length;
}"""

OF_RUN = GRAFANA / "dashboards" / "memtrace-run.json"
NAMES = [path.stem for path in SHIPPED]


EMPTY = {
    "memtrace-fleet": {"Firing alerts"},
    "memtrace-run": {"Time until a leak fills the memory", "Host memory in use"},
    "memtrace-ranks": set(),
}
"""Panels that have nothing to show of the recorded run: it has no leak, and its hosts no node_exporter."""


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


@contextmanager
def of_four_ranks(directory: Path) -> Iterator[str]:
    """A real Prometheus that holds the last hour of a recorded run of four ranks."""
    data = backfill(directory, ranks=4, steps=236, end=time.time() - 10)
    with prometheus(directory, data=data) as url:
        yield url


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The last hour of that run."""
    with of_four_ranks(tmp_path_factory.mktemp("history")) as url:
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
    assert list(variables) == ["datasource", "job"] + (
        [] if fleet else ["run", "run_id", "instance", "rank", "fullest"]
    )
    for name in set(variables) - {"datasource", "run", "run_id", "fullest"}:
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
    device = panel_of_run("Memory of the device")
    (link,) = device["fieldConfig"]["defaults"]["links"]
    address = urlsplit(link["url"])
    (pane,) = json.loads(parse_qs(address.query)["panes"][0]).values()
    (query,) = pane["queries"]
    assert address.path == "/explore"
    assert query["expr"] == 'DCGM_FI_DEV_FB_USED{UUID="${__field.labels.gpu_uuid}"}'
    assert all(target["expr"].startswith("max by (gpu_uuid) ") for target in device["targets"])


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_dashboard_is_drawn(path: Path, history: str, tmp_path: Path) -> None:
    """In Chromium no query fails, no variable stays, no panel type is unknown; what is empty is so for a reason.

    The annotations mark the failed allocation and the alert that the recorded run holds.
    """
    drawn = draw(path, history, tmp_path / f"{path.stem}.png")
    assert drawn.errors == []
    assert drawn.empty == EMPTY[path.stem]
    assert drawn.marks == ({} if path.stem == "memtrace-fleet" else {"Out of memory": 1, "Alerts": 1})
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 30_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "piechart"}, "unknown panel type piechart"),
        ({"targets": [{"refId": "A", "expr": "memtrace_no"}], "fieldConfig": {"defaults": {}}}, "no data"),
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
    drawn = draw(path, history, tmp_path / "broken.png")
    assert any(message in error for error in drawn.errors)


def test_several_ranks_can_be_chosen(history: str, tmp_path: Path) -> None:
    """A variable with several values becomes an alternation, and the dashboard is drawn for those."""
    assert draw(OF_RUN, history, tmp_path / "two.png", "&var-rank=1&var-rank=3").errors == []


def test_annotations_follow_the_choice(history: str, tmp_path: Path) -> None:
    """A failed allocation of another rank is no mark on the chosen ones."""
    assert draw(OF_RUN, history, tmp_path / "other.png", "&var-rank=3").marks["Out of memory"] == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What a drawn dashboard shows."""

    errors: list[str]
    """All that was wrong."""
    marks: dict[str, int]
    """How much each annotation marks."""
    empty: set[str]
    """Panels that have nothing to show, and say so in words."""
    text: str
    """The words of the page."""
    links: list[str]
    """Where its words lead."""


def draw(path: Path, prometheus_url: str, picture: Path, parameters: str = "") -> Drawing:
    """Draws a dashboard and keeps its picture."""
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
        text = opened.inner_text("body")
        links = opened.evaluate("() => [...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))")
    assert report["panels"]
    fonts = "/public/fonts/"  # of Grafana's server; its library does not ship them
    errors = [*report["errors"], *(text for text in wrong if fonts not in text)]
    return Drawing(errors=errors, marks=report["annotations"], empty=set(report["empty"]), text=text, links=links)

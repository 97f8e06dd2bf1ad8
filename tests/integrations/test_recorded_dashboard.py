"""The dashboard of a run, drawn from what a real device exported: see tests/fixtures/gpu/README.md."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from promql import ROOT
from servers import ask, prometheus
from test_dashboards import GRAFANA, draw

RUN = ROOT / "tests" / "fixtures" / "gpu" / "llama-3-8b"
SCRAPE, FACTS = RUN / "metrics.txt", RUN / "facts.json"
TARGET = 'job="training",instance="gpu-node-0:16368"'
INTERVAL, SAMPLES = 15, 40


def open_metrics(end: float) -> Iterator[str]:
    """Yields the scrape as if a Prometheus had made it again and again until `end`, in the OpenMetrics format."""
    for line in SCRAPE.read_text(encoding="utf-8").splitlines():
        series, value = line.rsplit(" ", 1)
        name, labels = series.removesuffix("}").split("{")
        for sample in range(SAMPLES, 0, -1):
            yield f"{name}{{{TARGET},{labels}}} {value} {end - INTERVAL * sample:.3f}"
    yield "# EOF"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("recorded")
    text, data = directory / "run.om", directory / "data"
    text.write_text("\n".join(open_metrics(time.time())) + "\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)]
    subprocess.run(command, check=True, capture_output=True)
    with prometheus(directory, data=data) as found:
        yield found


def test_the_run_is_drawn(url: str, tmp_path: Path) -> None:
    """No query fails, and no panel is empty."""
    assert draw(GRAFANA / "dashboards" / "memtrace-run.json", url, tmp_path / "run.png").errors == []


def test_the_stack_of_the_peak_is_what_torch_counted(url: str) -> None:
    """The categories of the peak add up to 132.82 GB in Prometheus, too."""
    (found,) = ask(url, "query", query='sum(last_over_time(memtrace_memory_bytes{moment="peak"}[5m]))')["result"]
    assert int(float(found["value"][1])) == json.loads(FACTS.read_text(encoding="utf-8"))["peak_requested"]

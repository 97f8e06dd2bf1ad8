"""docs/performance.md says what the committed results say, and no more."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from benchmarks.costs import MEASUREMENTS

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_performance.py"))


def test_the_page_is_what_the_results_make() -> None:
    """docs/performance.md is what docs/build_performance.py makes of benchmarks/results/."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == SCRIPT["render"](), "run python docs/build_performance.py"


def test_a_bound_that_was_not_kept_is_said(tmp_path: Path) -> None:
    """The page never rounds a figure to the right side of its bound."""
    environment: dict[str, Any] = {
        "date": "2026-01-01",
        "device": "cpu",
        "device_name": "CPU",
        "cores": 2,
        "threads": 1,
        "load_average": 0.5,
        "python": "3",
    }
    rows = [
        {"what": "one", "value": 0.1001, "unit": "s", "bound": 0.1},
        {"what": "two", "value": 0.0999, "unit": "s", "bound": 0.1},
    ]
    result = {"benchmark": "costs-attach", "environment": {**environment, "packages": {"torch": "2"}}, "rows": rows}
    (tmp_path / "cpu-costs-attach.json").write_text(json.dumps(result), encoding="utf-8")
    page = SCRIPT["render"](tmp_path)
    assert "| one | 100 ms |  | 100 ms: not kept |" in page
    assert SCRIPT["COSTS"].keys() == MEASUREMENTS.keys()
    assert page.count("not measured yet: `python -m benchmarks.costs ") == 4
    assert "| two | 99.9 ms |  | 100 ms: kept |" in page

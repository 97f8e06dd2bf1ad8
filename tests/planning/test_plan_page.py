"""The page of plans is made of the tables."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    """docs/plan.md is what docs/build_plan.py makes of the tables."""
    page = runpy.run_path(str(DOCS / "build_plan.py"))["render"]()
    assert (DOCS / "plan.md").read_text(encoding="utf-8") == page, "run python docs/build_plan.py"

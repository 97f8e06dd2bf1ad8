"""The documentation names only metrics that exist."""

import re
from pathlib import Path

import pytest
from promql import ROOT, known

DOCS = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "integrations").rglob("*.md"), ROOT / "README.md"])
NAME = re.compile(r"(?<![\w/.-])(?:(?:rank|run):)?memtrace_\w+(?::\w+)*\b(?![\w./*-]|\()")


@pytest.mark.parametrize("path", [path for path in DOCS if path.exists()], ids=lambda path: path.name)
def test_metrics_in_the_documentation_exist(path: Path) -> None:
    """Every name of a metric or a recorded series on the page is exported or recorded."""
    assert sorted(set(NAME.findall(path.read_text())) - set(known())) == []

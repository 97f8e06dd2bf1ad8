"""The table of docs/faults.md against the tests that it names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("test_*.py"))
CHECKS_OF_TABLES = {"test_every_method_of_the_callback_is_in_the_table", "test_every_row_has_its_test"}


def test_every_row_has_its_test() -> None:
    """Every test of a fault has a row, and every row a test that exists."""
    named = re.findall(r"`(tests/\S+::\w+)`", (ROOT / "docs" / "faults.md").read_text())
    there = {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in CHECKS_OF_TABLES
    }
    assert sorted(named) == sorted(there)

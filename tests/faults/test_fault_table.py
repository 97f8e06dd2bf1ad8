"""The table of docs/faults.md against the tests that it names."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("test_*.py"))
CHECKS_OF_TABLES = {
    "test_every_method_of_the_callback_is_in_the_table",
    "test_every_row_has_its_test",
    "test_each_shell_is_there",
}


def named_in(paths: Iterable[Path]) -> set[str]:
    return {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in CHECKS_OF_TABLES
    }


def test_every_row_has_its_test() -> None:
    """Every test of a fault has a row, and every row a test that exists: some are among the laws, some of the guard."""
    named = re.findall(r"`(tests/\S+::\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) == len(set(named))
    assert named_in(FILES) <= set(named)
    elsewhere = [*(ROOT / "tests" / "laws").glob("test_*.py"), ROOT / "tests" / "test_guard.py"]
    assert set(named) <= named_in([*FILES, *elsewhere])

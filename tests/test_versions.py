"""The private names of torch in the code, against the table of what each version has; and the page of versions."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from versions import page
from versions.environments import installed
from versions.names import NAMES, has
from versions.rows import PACKAGES, ROWS, Row
from versions.run import differences

PACKAGE = Path(__file__).parent.parent / "src" / "memtrace"
HOMES = (
    "sources/torch_private.py",
    "sources/autograd_torch_private.py",
    "sources/recording_torch_private.py",
    "sources/engines_torch_private.py",
    "simulation/torch_fake.py",
)
ROOMS = {"_C", "_autograd", "_dynamo", "_functorch", "_ops", "_profiler"}
"""Modules of torch: what is asked of them has a name of its own."""
PREFIXES = {"_saved_"}


def private_names(path: Path) -> set[str]:
    """Returns the private attributes that a module asks for, also by `getattr`; what it defines itself is left out."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    asked |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {one for one in asked - own if one.startswith("_") and not one.startswith("__") and one.isidentifier()}


def last(spelling: str) -> str:
    return spelling.replace(":", ".").rpartition(".")[2]


def test_every_private_name_in_the_code_is_in_the_list() -> None:
    """And the list has none that the code does not use."""
    used = set().union(*(private_names(PACKAGE / home) for home in HOMES)) - ROOMS - PREFIXES
    listed = {last(spelling) for name in NAMES for spelling in name.spellings}
    assert used - listed == set()
    assert {one for one in listed if one.startswith("_")} - used == set()


@pytest.mark.parametrize("version", [row.torch for row in ROWS])
def test_each_version_has_a_spelling_of_each_name(version: str) -> None:
    """Or the list says what users of it do without. Table and list name the same."""
    table = json.loads(page.TABLE.read_text())[version]
    assert {*table} == {spelling for name in NAMES for spelling in name.spellings}
    assert [name for name in NAMES if not any(map(table.__getitem__, name.spellings)) and not name.without] == []


def test_the_installed_version_has_a_spelling_of_each_name() -> None:
    """Whichever it is; where the table has a row of it, as the table says."""
    import torch

    assert [name for name in NAMES if not any(map(has, name.spellings)) and not name.without] == []
    table = json.loads(page.TABLE.read_text()).get(torch.__version__.partition("+")[0], {})
    assert {spelling: has(spelling) for spelling in table} == table


def test_the_page_is_what_the_runs_have_noted() -> None:
    """Every failure is explained in its row, and every explanation is of a test that has failed."""
    assert page.PAGE.read_text() == page.text()
    known = page.results()
    for row in ROWS:
        if row.torch in known:
            covered, _ = page.explanations(row, known[row.torch])
            assert {*covered} == {one.reason for one in row.explained}


def test_a_row_is_run_in_no_other_environment_than_its_own() -> None:
    """What differs is named, as is what is not there; what a build adds to its version does not count."""
    row = Row(torch="2.6.0", transformers="4.50.3", others=("accelerate==1.6.0",))
    there = dict.fromkeys(("torch", "transformers", "accelerate"), "2.6.0")
    others = {one.partition("<")[0]: "9.1.1" for one in PACKAGES}
    assert differences(row, {**others, **there, "pytest": "9.2.0", "psutil": None}) == [
        "transformers==4.50.3: 2.6.0",
        "accelerate==1.6.0: 2.6.0",
        "psutil: not installed",
        "pytest<9.2: 9.2.0",
    ]
    found = installed(Path(sys.executable), ["torch", "no-such-package"])
    assert found["no-such-package"] is None
    assert found["torch"] is not None
    assert "+" not in found["torch"]

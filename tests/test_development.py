"""The plan of the house: docs/development.md and the rooms of src/memtrace."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "memtrace"
DOCS = ROOT / "docs"
LARGEST_ROOM = 17
WALK = re.compile(r"^\d+\. `([\w/]+\.py)`", re.MULTILINE)
AT_THE_TOP = {"__init__", "__main__", "config", "errors", "guard"}

ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGE = (DOCS / "development.md").read_text(encoding="utf-8")
WALKS = [WALK.findall(part) for part in PAGE.split("\n### ")[1:] if WALK.search(part)]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def room_of(path: str) -> str:
    return path.split("/", maxsplit=1)[0]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_every_room_says_what_it_is(room):
    """What comes in, what goes out, what it must not know, and where the next thing goes."""
    paragraph = " ".join(docstring(room / "__init__.py").split())
    for said in (r"In come", r"Out (go|come)", r"Must not", r"goes into|becomes a|is a (row|file|path)"):
        assert re.search(said, paragraph), said


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_every_module_has_a_room_and_a_sentence(module):
    """A module says in its first line what it is; at the top are only those that users import or that have no room."""
    assert docstring(module).splitlines()[0].endswith((".", "?"))
    assert module.parent in ROOMS or module.stem in AT_THE_TOP


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_no_room_is_crowded(room):
    """A room has about 15 modules at most."""
    assert len([*room.glob("*.py")]) - 1 <= LARGEST_ROOM


def test_the_picture_is_that_of_the_code():
    """The flow in the page is the one that the imports make, and every room is named on the page."""
    spec = importlib.util.spec_from_file_location("build_development", DOCS / "build_development.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.page() == PAGE, "run python docs/build_development.py"
    assert {path.name for path in ROOMS if path.parent == PACKAGE} <= set(re.findall(r"`(\w+)/`", PAGE))


def test_three_walks():
    """Each has at most eight files, all of them there, and enters no room twice."""
    assert len(WALKS) == 3
    for walk in WALKS:
        assert 2 <= len(walk) <= 8
        assert all((PACKAGE / name).is_file() for name in walk), walk
        entered = [room for at, room in enumerate(map(room_of, walk)) if at == 0 or room_of(walk[at - 1]) != room]
        assert len(entered) == len(set(entered)), walk

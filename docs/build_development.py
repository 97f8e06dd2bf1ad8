"""Draws the flow between the rooms of src/memtrace into docs/development.md, from the imports of the code.

`python docs/build_development.py` writes the page anew; a test compares the two.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "memtrace"
PAGE = ROOT / "docs" / "development.md"
BEGIN, END = "<!-- flow: made by docs/build_development.py -->", "<!-- end of flow -->"


def rooms() -> dict[str, str]:
    """Returns each room with the first sentence of its paragraph, in the order of their names."""
    packages = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    return {package.name: first_sentence(package / "__init__.py") for package in packages}


def first_sentence(path: Path) -> str:
    """Returns the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    return docstring.splitlines()[0]


def imports() -> dict[str, set[str]]:
    """Returns the rooms that each room imports from, itself left out."""
    names = rooms()
    found: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        for path in (PACKAGE / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memtrace."):
                    other = str(node.module).split(".")[1]
                    if other in names and other != name:
                        found[name].add(other)
    return found


def direct(below: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the pairs (from, to) along which data goes, without those that a longer way says too."""
    reach = {name: set(others) for name, others in below.items()}
    for middle, name in product(reach, reach):  # Floyd and Warshall
        if middle in reach[name]:
            reach[name] |= reach[middle]
    return sorted(
        (other, name)
        for name, others in below.items()
        for other in others
        if not any(other in reach[between] for between in others)
    )


def flow() -> str:
    """Returns the picture, as Mermaid."""
    edges = "\n".join(f"    {start} --> {end}" for start, end in direct(imports()))
    return f"{BEGIN}\n```mermaid\nflowchart BT\n{edges}\n```\n{END}"


def page() -> str:
    """Returns the page with the picture as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + flow() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

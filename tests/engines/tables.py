"""Tables of docs/engines.md, written by the tests that measure them.

A test hands over its rows and fails where the page says something else. With UPDATE_DOCS=1 in the environment it writes
them into the page instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def check_table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, exact: bool = True) -> None:
    """Compares the table between the markers `<!-- table: NAME -->` and `<!-- end -->` of the page.

    A table that is not exact has figures that change a little from run to run: only its first column is compared.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    wanted = "\n".join(lines)
    begin = f"<!-- table: {name} -->\n"
    page = PAGE.read_text()
    before, rest = page.split(begin)
    found, after = rest.split("\n<!-- end -->", 1)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(f"{before}{begin}{wanted}\n<!-- end -->{after}")
    elif not exact:
        labels = [line.split("|")[1] for line in wanted.splitlines()]
        assert [line.split("|")[1] for line in found.splitlines()] == labels, f"docs/engines.md lacks rows of {name}"
    else:
        assert found == wanted, f"docs/engines.md is out of date: run the tests with UPDATE_DOCS=1\n{wanted}"


def per_parameter(size: float, parameters: int) -> str:
    """Returns bytes per parameter with two decimals."""
    return f"{size / parameters:.2f}"

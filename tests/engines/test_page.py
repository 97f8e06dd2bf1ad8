"""docs/engines.md names the test that shows each row, and there is such a test."""

from __future__ import annotations

import re

from tables import PAGE

ROOT = PAGE.parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_every_test_that_the_page_names_is_there() -> None:
    """A renamed test takes its row along."""
    named = NAMED.findall(PAGE.read_text())
    assert len(named) > 20
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_form_beside_the_plain_loop_has_its_test() -> None:
    """No row says what is seen without saying what shows it."""
    section = PAGE.read_text().split("## Beside the plain loop")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        assert NAMED.search(row.rsplit("|", 2)[1]), row

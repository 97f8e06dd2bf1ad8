"""Writes docs/versions.md from the results of the rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from versions.names import AS_ABOVE, NAMES
from versions.rows import ROWS, TESTS, Row

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent / "private_names.json"
PAGE = Path(__file__).parent.parent / "docs" / "versions.md"

HEAD = """\
# Versions of torch and transformers

memtrace runs with torch 2.6 or newer; the callback for Trainer and simulated plans with transformers 4.50 or newer and
accelerate 1.1 or newer. Made by `make test-versions`, which runs laws, sources, attribution, adapters, engines and
simulated plans in an environment for each row, on a CPU. A test of what a version lacks is not
run in its row, and counted and named below. Tests that need a GPU are not part of it.

| torch | transformers | tests run | passed | failed | not run |
| --- | --- | ---: | ---: | ---: | ---: |
"""

SHARDS = (
    "* FSDP2's shards are master weights where a lower-precision copy computes, and weights where none does: two ranks "
    "with gloo, `tests/engines/test_fsdp.py`."
)


def results() -> dict[str, dict[str, Any]]:
    """Returns what the runs have noted, by version of torch."""
    found = (json.loads(path.read_text()) for path in RESULTS.glob("*.json"))
    return {result["torch"]: result for result in found}


def failed(result: dict[str, Any]) -> list[str]:
    """Returns the identifiers of the tests that have failed in a row."""
    return [name for part in result["tests"].values() for name in part["failed"]]


def not_run(result: dict[str, Any]) -> Counter[str]:
    """Returns how many tests of a row were not run, by the reason."""
    return sum((Counter(part["not_run"]) for part in result["tests"].values()), Counter())


def explanations(row: Row, result: dict[str, Any]) -> tuple[Counter[str], list[str]]:
    """Returns how many failures of a run each explanation of its row covers, and the failures that none covers."""
    covered: Counter[str] = Counter()
    others = []
    for name in failed(result):
        known = next((one for one in row.explained if re.search(one.tests, name)), None)
        if known is None:
            others.append(name)
        else:
            covered[known.reason] += 1
    return covered, others


def lost_by_name(row: Row) -> list[str]:
    """Returns what is lost because the row's torch has no spelling of a private name."""
    table = json.loads(TABLE.read_text())[row.torch]
    missing = [name for name in NAMES if not any(map(table.__getitem__, name.spellings))]
    return [f"{name.without} (no `{name.spellings[0]}`)" for name in missing if name.without != AS_ABOVE]


def text() -> str:
    """Returns the page."""
    known = results()
    rows = [row for row in ROWS if row.torch in known]
    lines = [HEAD.rstrip("\n")]
    for row in rows:
        result = known[row.torch]
        run, passed = (sum(part[which] for part in result["tests"].values()) for which in ("run", "passed"))
        counts = [run, passed, len(failed(result)), not_run(result).total()]
        lines.append(f"| {row.torch} | {row.transformers} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    missing = [row.torch for row in ROWS if row.torch not in known]
    if missing:
        lines += ["", "Rows that are not run yet: torch " + ", ".join(missing) + "."]
    for row in rows:
        lines += ["", f"## torch {row.torch}, transformers {row.transformers}", "", *_details(row, known[row.torch])]
    return "\n".join(lines) + "\n"


def _details(row: Row, result: dict[str, Any]) -> Iterator[str]:
    covered, others = explanations(row, result)
    assert not others, f"failures of torch {row.torch} that no explanation covers: {others}"
    left = [tests for tests in TESTS if tests not in result["tests"]]
    if left:
        yield (
            "Not run to its end yet, or to be run again after a mend: "
            + ", ".join(f"`{tests}`" for tests in left)
            + "."
        )
        yield ""
    yield f"Python {result['python']}, " + ", ".join(name.replace("==", " ") for name in row.others) + "."
    yield ""
    lost = [*(f"* Lost: {what}." for what in lost_by_name(row)), *(f"* {what}" for what in row.lost)]
    yield from lost or ["* Nothing is lost."]
    engines = result["tests"].get("tests/engines")
    if engines is not None and not any(".test_fsdp::" in name for name in engines["failed"]):
        yield SHARDS
    yield from (f"* {_tests(count)} not run: {reason}." for reason, count in not_run(result).items())
    yield from (f"* {_tests(count)} failed: {reason}" for reason, count in covered.items())


def _tests(count: int) -> str:
    return "1 test" if count == 1 else f"{count:,} tests"


def write() -> None:
    """Writes the page."""
    PAGE.write_text(text())


if __name__ == "__main__":
    write()

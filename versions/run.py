"""Makes an environment for each row, runs the tests in it, and notes what came of them: `make test-versions`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

from versions import page
from versions.environments import ROOT, VARIABLES, environment, installed, version_of
from versions.rows import PACKAGES, ROWS, TESTS, Row


def wanted_by(row: Row) -> list[str]:
    """Returns what is installed for a row."""
    return [f"torch=={row.torch}", f"transformers=={row.transformers}", *row.others, *PACKAGES]


def differences(row: Row, found: Mapping[str, str | None]) -> list[str]:
    """Returns what an environment has otherwise than its row says: a package without a version must be there."""
    wanted = (Requirement(one) for one in wanted_by(row))
    return [
        f"{one}: {found[one.name] or 'not installed'}"
        for one in wanted
        if found[one.name] is None or not one.specifier.contains(found[one.name] or "", prereleases=True)
    ]


def run(python: Path, tests: str, workers: int) -> dict[str, Any]:
    """Runs some of the tests in an environment and returns what came of them."""
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadgroup", "--no-loadscope-reorder"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", tests]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **VARIABLES}, check=False)
        return read(report)


def read(report: Path) -> dict[str, Any]:
    """Returns the counts of a report of pytest, what failed, and why tests were not run."""
    failed, skipped, run, reasons = set(), Counter[str](), 0, {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        run += 1
        for kind in ("failure", "error"):
            outcome = case.find(kind)
            if outcome is not None:
                failed.add(name)
                reasons[name] = (outcome.get("message") or "").strip().splitlines()[0][:200]
        outcome = case.find("skipped")
        if outcome is not None:
            skipped[outcome.get("message") or ""] += 1
    return {
        "run": run - sum(skipped.values()),
        "passed": run - sum(skipped.values()) - len(failed),
        "failed": {name: reasons[name] for name in sorted(failed)},
        "not_run": dict(sorted(skipped.items())),
    }


def names(python: Path) -> dict[str, bool]:
    """Returns which of the private names that memtrace knows the environment's torch has."""
    command = [python, "-m", "versions.names"]
    output = subprocess.run(command, cwd=ROOT, env={**os.environ, **VARIABLES}, capture_output=True, check=True)
    found: dict[str, bool] = json.loads(output.stdout)
    return found


def main() -> None:
    """Runs the rows that are asked for, and writes the results and the page."""
    parser = argparse.ArgumentParser(prog="python -m versions.run", description=__doc__)
    parser.add_argument("rows", nargs="*", help="versions of torch; all rows without")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-versions", help="where they are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--again", action="store_true", help="also what has been run; else what is noted stays")
    parser.add_argument("--names-only", action="store_true", help="write the table of private names, run no test")
    arguments = parser.parse_args()
    page.RESULTS.mkdir(exist_ok=True)
    for row in ROWS:
        if arguments.rows and row.torch not in arguments.rows:
            continue
        python = environment(arguments.environments.absolute() / row.torch, wanted_by(row))
        there = installed(python, [Requirement(one).name for one in wanted_by(row)])
        if wrong := differences(row, there):
            sys.exit(f"the environment of torch {row.torch} is another than its row: {', '.join(wrong)}")
        table = json.loads(page.TABLE.read_text()) if page.TABLE.exists() else {}
        table[row.torch] = names(python)
        table = {known.torch: table[known.torch] for known in ROWS if known.torch in table}
        page.TABLE.write_text(json.dumps(table, indent=1) + "\n")
        for tests in () if arguments.names_only else TESTS:
            noted = page.results().get(row.torch, {})
            if arguments.again or tests not in noted.get("tests", {}):
                found = {**noted.get("tests", {}), tests: run(python, tests, arguments.workers)}
                ordered = {known: found[known] for known in TESTS if known in found}
                note = {"torch": row.torch, "transformers": row.transformers, "python": version_of(python)}
                note["tests"] = ordered
                (page.RESULTS / f"{row.torch}.json").write_text(json.dumps(note, indent=1) + "\n")
    page.write()


if __name__ == "__main__":
    main()

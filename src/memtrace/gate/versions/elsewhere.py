"""Plans cases in an interpreter of its own, with other packages first on its path.

As a script it is that interpreter: it reads what to plan from standard input and prints what came of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memtrace
from memtrace.errors import PlanError
from memtrace.gate.cases import Case, Tolerance
from memtrace.gate.processes import Outcome, Unplanned, plan_cases
from memtrace.gate.result import CaseResult, parse_result, result_document
from memtrace.record.strict_json import Fields, parse_json

ENDED = "its process ended"
"""Begins the reason of a case whose process did: it may go well another time."""

SEE = "see what it printed"
"""Ends such a reason; what was printed last takes the place of it."""


def plan_elsewhere(
    cases: Iterable[Case],
    root: Path,
    python_path: Sequence[Path],
    *,
    first: Sequence[Path] = (),
    package: str | None = None,
    jobs: int = 1,
) -> tuple[dict[str, Outcome], str | None]:
    """Returns what each case takes, by name, and the version of a package that was in use.

    Args:
        cases: what to plan.
        root: the directory in which their paths begin; the interpreter runs in it.
        python_path: directories that come first where their functions are imported from.
        first: directories that stand first on Python's path, before memtrace and what is installed.
        package: whose version is returned; None returns None.
        jobs: how many processes plan at a time.

    Raises:
        PlanError: the interpreter ended before it had an answer; the message ends in what it printed last.
    """
    request = {
        "cases": [asdict(case) for case in cases],
        "root": str(root),
        "python_path": [str(path) for path in python_path],
        "package": package,
        "jobs": jobs,
    }
    own = Path(memtrace.__file__).parent.parent
    path = [*map(str, first), str(own), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    if done.returncode:
        raise PlanError(f"{ENDED} with status {done.returncode}: {_last_line(done.stderr)}")
    answer = Fields.of(parse_json(done.stdout, "what was planned elsewhere"), "what was planned elsewhere")
    outcomes = answer.object("outcomes")
    found = {name: read_outcome(outcomes.object(name), _last_line(done.stderr)) for name in outcomes}
    return found, answer.optional("version", Fields.text)


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    """Returns the JSON form of an outcome."""
    return result_document(outcome) if isinstance(outcome, CaseResult) else {"reason": outcome.reason}


def read_outcome(fields: Fields, printed: str = SEE) -> Outcome:
    """Returns the outcome that an object stands for.

    Args:
        fields: the object.
        printed: takes the place of `SEE` in a reason.

    Raises:
        LogFormatError: it is none.
    """
    reason = fields.optional("reason", Fields.text)
    return parse_result(fields) if reason is None else Unplanned(reason=reason.replace(SEE, printed))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it printed nothing"


def _main() -> None:
    request = json.load(sys.stdin)
    cases = [Case(**{**fields, "tolerance": Tolerance(**fields["tolerance"])}) for fields in request["cases"]]
    python_path = [Path(path) for path in request["python_path"]]
    outcomes = plan_cases(cases, Path(request["root"]), python_path, request["jobs"])
    package = request["package"]
    answer = {
        "outcomes": {name: outcome_document(outcome) for name, outcome in outcomes.items()},
        "version": None if package is None else importlib.metadata.version(package),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()

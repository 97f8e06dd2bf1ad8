"""Plans cases with other packages, or other code, first on Python's path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from memtrace.errors import OutputError, PlanError
from memtrace.gate.case_file import OWN_FILE, read_case_file
from memtrace.gate.cases import Case
from memtrace.gate.processes import Outcome, Unplanned, plan_cases

PATHS = ("config", "deepspeed")
"""Keys of a case that name a file."""

_SEE = "; see what it printed"


def plan_elsewhere(
    cases: Iterable[Case],
    root: Path,
    python_path: Sequence[Path],
    first: Sequence[Path],
    *,
    directory: Path | None = None,
    jobs: int = 1,
) -> dict[str, Outcome]:
    """Returns what each case takes, by name.

    Args:
        cases: what to plan; their tolerances do not matter.
        root: the directory in which their paths begin.
        python_path: directories that come first where their functions are imported from.
        first: directories that stand first on the path of the Python that plans, before what is installed.
        directory: in which that Python runs; None for the current one.
        jobs: how many are planned at a time.

    Raises:
        PlanError: that Python ended before it had an answer; the message ends in what it printed last.
    """
    path = [*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    with TemporaryDirectory(prefix="memtrace-") as place, TemporaryFile() as printed:
        file = Path(place) / OWN_FILE
        file.write_text(_text(cases, root, python_path), encoding="utf-8")
        try:
            outcomes = plan_cases(
                read_case_file(file), jobs=jobs, environment=environment, directory=directory, printed=printed
            )
        except OutputError as error:
            raise PlanError(str(error).replace(_SEE, _last_line(printed))) from error
        said = _last_line(printed)
    return {name: _with(said, outcome) for name, outcome in outcomes.items()}


def has_ended(outcome: Outcome) -> bool:
    """Returns whether there is no plan because a process ended: it may go well another time."""
    return isinstance(outcome, Unplanned) and outcome.reason.startswith("its process ended")


def _text(cases: Iterable[Case], root: Path, python_path: Sequence[Path]) -> str:
    """Returns a file of cases that may lie anywhere: strings of JSON are strings of TOML."""
    lines = [f"pythonpath = {json.dumps([str(path) for path in python_path], ensure_ascii=False)}"]
    for case in cases:
        lines += ["", f"[cases.{json.dumps(case.name)}]"]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in _settings(case, root).items()]
    return "\n".join(lines) + "\n"


def _settings(case: Case, root: Path) -> Mapping[str, Any]:
    values = {
        field.name: getattr(case, field.name) for field in fields(case) if field.name not in ("name", "tolerance")
    }
    for key in PATHS:
        if values[key] is not None and (root / values[key]).exists():
            values[key] = str(root / values[key])
    return {key: value for key, value in values.items() if value is not None}


def _with(said: str, outcome: Outcome) -> Outcome:
    if has_ended(outcome):
        assert isinstance(outcome, Unplanned)
        return Unplanned(reason=outcome.reason.replace(_SEE, said))
    return outcome


def _last_line(printed: Any) -> str:
    """Returns what stands last in a file, as the end of a sentence; nothing where it is empty."""
    printed.seek(0)
    lines = [line.strip() for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:500]}" if lines else ""

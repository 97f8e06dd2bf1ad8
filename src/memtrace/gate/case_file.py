"""Reading the file of cases: `memtrace.toml`, or `[tool.memtrace]` in `pyproject.toml`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from memtrace.errors import ConfigError
from memtrace.gate.cases import Case, Tolerance

OWN_FILE, PROJECT_FILE = "memtrace.toml", "pyproject.toml"
BASELINE = "memtrace-baseline.json"
"""The baseline's name where the file of cases gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFile:
    """The cases of a repository."""

    path: Path
    cases: Mapping[str, Case]
    """By name, in alphabetical order."""
    baseline: Path
    python_path: tuple[Path, ...]
    """Directories where Python looks for what `build`, `batch`, `loss` and `optimizer` name, first."""

    @property
    def root(self) -> Path:
        """The directory in which paths begin."""
        return self.path.parent


def find_case_file(directory: Path) -> Path:
    """Returns the file of cases of a directory: memtrace.toml, else a pyproject.toml with `[tool.memtrace]`.

    Raises:
        ConfigError: there is neither.
    """
    if (directory / OWN_FILE).is_file():
        return directory / OWN_FILE
    project = directory / PROJECT_FILE
    if project.is_file() and _table_of(project) is not None:
        return project
    raise ConfigError(
        f"{directory} has no cases: expected {OWN_FILE} with [cases.NAME], or {PROJECT_FILE} with "
        "[tool.memtrace.cases.NAME]; --file names another"
    )


def read_case_file(path: Path) -> CaseFile:
    """Returns the cases that a file names.

    Raises:
        ConfigError: it cannot be read, or has a key or a value that has no meaning; the message names it.
    """
    path = path.absolute()
    table = _table_of(path)
    if table is None:
        raise ConfigError(f"{path} has no table [tool.memtrace]")
    _check_keys(table, ("baseline", "cases", "pythonpath"), str(path))
    cases = table.get("cases")
    if not isinstance(cases, dict) or not cases:
        raise ConfigError(f"{path} has no cases: expected at least one table [cases.NAME]")
    baseline = table.get("baseline", BASELINE)
    if not isinstance(baseline, str) or not baseline:
        raise ConfigError(f"{path}: baseline must be a path, got {baseline!r}")
    directories = table.get("pythonpath", ["."])
    if not isinstance(directories, list) or not all(isinstance(each, str) for each in directories):
        raise ConfigError(f"{path}: pythonpath must be a list of paths, got {directories!r}")
    return CaseFile(
        path=path,
        cases={name: _case_of(name, cases[name], str(path)) for name in sorted(cases)},
        baseline=path.parent / baseline,
        python_path=tuple((path.parent / each).resolve() for each in directories),
    )


def case_lines(file: CaseFile) -> dict[str, int]:
    """Returns the line at which the table of each case begins, from 1; a case in another notation is left out."""
    lines = {}
    for number, line in enumerate(file.path.read_text(encoding="utf-8").splitlines(), start=1):
        header = _HEADER.match(line)
        if header is not None and header[2] in file.cases:
            lines[header[2]] = number
    return lines


def _table_of(path: Path) -> dict[str, Any] | None:
    """Returns the table that is memtrace's; None where a project's file has none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # wrong TOML and wrong UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from error
    if path.name != PROJECT_FILE:
        return document
    tools = document.get("tool")
    table = tools.get("memtrace") if isinstance(tools, dict) else None
    return table if isinstance(table, dict) else None


def _case_of(name: str, table: Any, source: str) -> Case:
    place = f"{source}: case {name}"
    if not isinstance(table, dict):
        raise ConfigError(f"{place} must be a table, got {table!r}")
    _check_keys(table, tuple(_KINDS), place)
    for key, value in table.items():
        if key != "tolerance" and type(value) not in _KINDS[key]:
            expected = " or ".join(_WORDS[kind] for kind in _KINDS[key] if kind in _WORDS)
            raise ConfigError(f"{place}: {key} must be {expected}, got {value!r}")
    try:
        tolerance = Tolerance.of(table.get("tolerance", 0))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    try:
        return Case(name=name, **{**table, "tolerance": tolerance})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{place}: unknown key {key!r}: {hint}")


_HEADER = re.compile(r"""\s*\[(?:tool\.memtrace\.)?cases\.(["']?)([\w.-]+)\1\]""")
_WORDS = {str: "a text", int: "a whole number", bool: "true or false"}
_HINTS = get_type_hints(Case)
_KINDS = {
    field.name: get_args(_HINTS[field.name]) or (_HINTS[field.name],) for field in fields(Case) if field.name != "name"
}
"""What type a key's value may have."""

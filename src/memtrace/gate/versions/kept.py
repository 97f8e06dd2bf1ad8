"""What came of cases that were planned before, kept in files: an interrupted search goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import memtrace
from memtrace.errors import LogFormatError, OutputError
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import CaseResult, parse_result, result_document
from memtrace.record.strict_json import Fields, read_document
from memtrace.record.whole_file import write_whole

OUTCOME_SCHEMA = "memtrace.outcome/1"

_LEFT_OUT = {"__pycache__", "build", "dist", "node_modules", "site-packages"}
_READ = (".py", ".json", ".toml")
_READ_WHOLE = 10**6


@dataclass(frozen=True, slots=True)
class KeptOutcomes:
    """Outcomes by name, in a directory."""

    directory: Path

    def find(self, name: str) -> Outcome | None:
        """Returns what was kept under a name; None where nothing was, or where it can no longer be read."""
        try:
            fields = read_document(self._path(name), "outcome", OUTCOME_SCHEMA)
            if fields is None:
                return None
            reason = fields.optional("reason", Fields.text)
            return parse_result(fields) if reason is None else Unplanned(reason=reason)
        except LogFormatError:
            return None

    def keep(self, name: str, outcome: Outcome) -> None:
        """Keeps an outcome.

        Raises:
            OutputError: nothing can be written there.
        """
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            document = result_document(outcome) if isinstance(outcome, CaseResult) else {"reason": outcome.reason}
            write_whole(path, json.dumps({"schema": OUTCOME_SCHEMA, **document}, sort_keys=True))
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}; name another directory with --cache") from error

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


@cache
def state_of_memtrace() -> str:
    """Returns a name for memtrace's version and its code, which may be changed without a new version."""
    return f"{memtrace.__version__} {state_of([Path(memtrace.__file__).parent])}"


def state_of(places: Iterable[Path]) -> str:
    """Returns a name for the contents of files and of the code (.py, .json, .toml) in directories, whatever their age.

    Left out are directories whose names begin with a dot, of installed packages and of builds. Of a file of more than
    a million bytes the size counts.
    """
    digest = sha256()
    for place in places:
        for path in [place] if place.is_file() else _code_in(place):
            contents = path.read_bytes() if path.stat().st_size <= _READ_WHOLE else str(path.stat().st_size).encode()
            digest.update(f"{path.relative_to(place)}\0{sha256(contents).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _code_in(directory: Path) -> Iterator[Path]:
    for place, inside, names in os.walk(directory):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name not in _LEFT_OUT)
        paths = (Path(place) / name for name in sorted(names) if name.endswith(_READ))
        yield from (path for path in paths if path.is_file())

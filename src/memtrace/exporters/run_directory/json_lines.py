"""Reading a log of one JSON value a line, which is rotated as it grows and whose writer may have been killed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memtrace.errors import LogFormatError
from memtrace.record.strict_json import parse_json

logger = logging.getLogger("memtrace")


def rotated_path(path: Path) -> Path:
    """Returns where the older part of a log is once it has grown to its limit."""
    return path.with_name(f"{path.name}.1")


def json_lines(path: Path, what: str) -> Iterator[tuple[Any, str]]:
    """Yields the value of each line and its place for messages, in the order of writing, the older part first.

    The end of a file that is being written, or whose writer was killed, may be a part of a line: it is left out. A
    part of a line further up is left out too, with one warning for the file.

    Args:
        path: the newer part.
        what: what it is, for messages.

    Raises:
        LogFormatError: there is no such file, it cannot be read, or it has lines of which none is JSON.
    """
    older = rotated_path(path)
    for part in (older, path) if older.is_file() else (path,):
        yield from _lines(part, what, may_be_missing=part is path and older.is_file())


def _lines(path: Path, what: str, *, may_be_missing: bool) -> Iterator[tuple[Any, str]]:
    torn: list[int] = []
    whole = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                try:
                    document = parse_json(line, place)
                except LogFormatError:
                    if line.endswith(b"\n"):
                        torn.append(number)
                    continue
                whole += 1
                yield document, place
    except FileNotFoundError as error:
        if not may_be_missing:
            raise LogFormatError(f"{path}: there is no such {what}") from error
    except OSError as error:
        raise LogFormatError(f"{path}: the {what} cannot be read: {error.strerror or error}") from error
    if torn and not whole:
        raise LogFormatError(f"{path}: must be a {what}, one JSON object a line, but no line is one")
    if torn:
        logger.warning("memtrace: %s: left out unfinished lines, %d in all, first line %d", path, len(torn), torn[0])

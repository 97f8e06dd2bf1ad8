"""The step log: one JSON line a step, appended as the step ends, readable whatever ended the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Self

from memtrace.config import DEFAULT_LOG_MAX_BYTES
from memtrace.errors import OutputError
from memtrace.exporters.run_directory.json_lines import json_lines, rotated_path
from memtrace.record.breakdown import StepRecord
from memtrace.record.schema import StepEncoder, parse_step

logger = logging.getLogger("memtrace")


def step_log_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank's step log is in the log directory of a run."""
    return Path(directory) / f"steps-rank{rank}.jsonl"


class StepLog:
    """Appends records to a step log; a context manager that closes it.

    A line is handed to the operating system before `write` returns: a killed process loses at most the line it was
    writing. A part of a line that an earlier process left is closed off, so that it spoils no other line.

    Args:
        path: the file; its directory is made where it is missing. An existing log is continued.
        max_bytes: size at which the file is renamed to `<name>.1`, in place of the one before.
        parts: returns the parts of a record's line, in ASCII; by default its JSON form.

    Raises:
        OutputError: the directory cannot be made, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_LOG_MAX_BYTES,
        parts: Callable[[StepRecord], list[bytes]] | None = None,
    ) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        self._parts = parts or StepEncoder().parts
        self._file: FileIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            self.close()
            reason = error.strerror or error
            raise OutputError(
                f"the step log {self.path} cannot be written: {reason}; set log_dir to a directory that can be "
                "written, or step_log=False for no log"
            ) from error

    @property
    def closed(self) -> bool:
        """Whether records are no longer written: after `close()`, or after a write has failed."""
        return self._file is None

    def write(self, record: StepRecord) -> None:
        """Appends one record.

        Where that fails (a full disk, a directory that is gone), the log is closed with one warning; later records
        are dropped.
        """
        if self._file is None:
            return
        line = [*self._parts(record), b"\n"]
        try:
            if self._size and self._size + sum(map(len, line)) > self._max_bytes:
                self._rotate()
            self._append(line)
        except OSError as error:
            self.close()
            logger.warning(
                "memtrace: the step log %s ends at step %d, training goes on: %s",
                self.path,
                record.step,
                error.strerror,
            )

    def close(self) -> None:
        """Closes the file. Closing twice does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # every line was handed over before
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()
        if self._size and not _ends_a_line(self.path):
            self._append([b"\n"])

    def _rotate(self) -> None:
        self.close()
        self.path.replace(rotated_path(self.path))
        self._open()

    def _append(self, parts: Sequence[bytes]) -> None:
        assert self._file is not None
        written, size = os.writev(self._file.fileno(), parts), sum(map(len, parts))
        self._size += size
        if written < size:  # a disk that is nearly full takes a part
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[self._file.write(rest) :]


def read_step_log(path: str | os.PathLike[str]) -> Iterator[StepRecord]:
    """Yields the records of a step log in the order of writing, those of its older part first.

    The end of a file that is being written, or whose writer was killed, may be a part of a line: it is skipped. A
    part of a line further up is skipped too, with one warning for the file.

    Raises:
        LogFormatError: no such file can be read, a line has not the form of a step record, or no line has.
    """
    for document, place in json_lines(Path(path), "step log"):
        yield parse_step(document, place)


def begins_a_run(record: StepRecord, before: StepRecord) -> bool:
    """Returns whether a record of a log is of another run than the one before it.

    That is where the launch is another one, and where the count of steps goes back, as in logs of older versions, or
    where a script trains twice.
    """
    return record.run_id != before.run_id or record.step <= before.step


def newest_run(records: Iterable[StepRecord]) -> list[StepRecord]:
    """Returns the records of the run that a log ends with."""
    found: list[StepRecord] = []
    for record in records:
        if found and begins_a_run(record, found[-1]):
            found.clear()
        found.append(record)
    return found


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

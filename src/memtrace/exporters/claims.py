"""Run directories that no two runs write to at once."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from io import FileIO
from pathlib import Path

from memtrace.record.snapshot import RunIdentity

try:
    import fcntl
except ImportError:  # not on Windows; then nothing is claimed
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EACCES, errno.EAGAIN)
_MAX_NAME = 100


class Claim:
    """A directory that this process alone writes to as one rank, until `release()` or its end.

    Another run that is at work there has its directory for itself: then it is one below, named for this run. A claim is
    a record lock, which forked children do not inherit and the system takes back from a process that dies. Where the
    file system has no locks nothing is refused.

    Args:
        directory: the wanted one; it is made where it is missing.
        identity: which process of which run this is.
    """

    def __init__(self, directory: Path, identity: RunIdentity) -> None:
        self.directory = directory
        self._lock: FileIO | None = None
        with suppress(OSError):  # what writes there says so, in its own words
            self._lock = _locked(directory, identity.rank)
            if self._lock is None:
                self.directory = directory / f"run-{safe_name(identity.run_id)}"
                self._lock = _locked(self.directory, identity.rank)

    def release(self) -> None:
        """Gives the directory free. Doing so twice does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                Path(lock.name).unlink()
            with suppress(OSError):
                lock.close()


def safe_name(text: str) -> str:
    """Returns a text as part of a file name on every file system."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:_MAX_NAME]


def _locked(directory: Path, rank: int) -> FileIO | None:
    """Returns an open file that holds the lock of a rank; None where another process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".rank{rank}.lock"
    while True:
        file = path.open("ab", buffering=0)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.close()
                return None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # it was released, and removed, between the two

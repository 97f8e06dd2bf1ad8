"""Reads a file of `torch.cuda.memory._dump_snapshot`, plain or gzip'ed, without running anything of it."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import IO

from memtrace.errors import LogFormatError, OutputError
from memtrace.forensics.plain_pickle import MAX_HELD, PlainPickle, Progress
from memtrace.forensics.rows import Rows
from memtrace.forensics.snapshot import AllocatorSnapshot, parse_snapshot

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"


def load_snapshot(path: str | os.PathLike[str], progress: Progress | None = None) -> AllocatorSnapshot:
    """Returns the snapshot in a file.

    Time goes with the size: see benchmarks/read_snapshot.py. Histories take about 64 bytes of memory an
    entry and each stack is kept once.

    Args:
        path: a pickle of protocol 2 to 5, which may be gzip'ed.
        progress: is told how many bytes of the pickle have been read, after each 256 KiB.

    Raises:
        LogFormatError: it is no pickle of a snapshot, ends early, or takes too much memory. Nothing of it was run.
        OutputError: it cannot be opened or read.
    """
    try:
        with Path(path).open("rb") as file:
            return _load(file, progress)
    except LogFormatError as error:
        raise LogFormatError(f"{path}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LogFormatError(f"{path}: the compressed file is damaged or ends early: {error}") from error
    except OSError as error:
        raise OutputError(f"{path}: the snapshot cannot be read: {error.strerror or error}") from error


def _load(file: IO[bytes], progress: Progress | None) -> AllocatorSnapshot:
    magic = file.read(4)
    file.seek(0)
    if not magic:
        raise LogFormatError("the file is empty: was the snapshot written whole?")
    if magic == _ZIP:
        raise LogFormatError("is a zip file, as torch.save() writes it: dump the snapshot with pickle.dump instead")
    rows = Rows()
    read = gzip.GzipFile(fileobj=file).read if magic[:2] == _GZIP else file.read
    pickle = PlainPickle(read, rows, progress)
    found = pickle.load()
    return parse_snapshot(found, rows, MAX_HELD - pickle.held)

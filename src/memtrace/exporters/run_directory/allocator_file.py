"""The allocator's recording of one step, as one compressed JSON file beside the step log."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path

from memtrace.allocator.recording import AllocatorRecording, parse_recording, recording_document
from memtrace.errors import LogFormatError, OutputError
from memtrace.record.strict_json import parse_json
from memtrace.record.whole_file import write_whole

MAX_UNPACKED = 256 * 2**20
"""Bytes of JSON that a recording may have: several million events."""


def allocator_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank's recording is in the log directory of a run."""
    return Path(directory) / f"allocator-rank{rank}.json.gz"


def write_recording(directory: str | os.PathLike[str], recording: AllocatorRecording) -> Path:
    """Writes a recording in place of the one before, whole or not at all, and returns where.

    Raises:
        OutputError: the file cannot be written.
    """
    path = allocator_path(directory, recording.rank)
    text = json.dumps(recording_document(recording), separators=(",", ":"))
    try:
        write_whole(path, gzip.compress(text.encode("ascii"), compresslevel=1, mtime=0))
    except OSError as error:
        raise OutputError(f"the recording {path} cannot be written: {error.strerror or error}") from error
    return path


def read_recording(path: str | os.PathLike[str]) -> AllocatorRecording:
    """Returns the recording in a file.

    Raises:
        LogFormatError: the file cannot be read, or is no recording.
    """
    source = str(path)
    try:
        with gzip.open(path, "rb") as file:
            text = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:  # gzip's own error is an OSError
        raise LogFormatError(f"{source}: the recording cannot be read: {error}") from error
    if len(text) > MAX_UNPACKED:
        raise LogFormatError(f"{source}: a recording must have at most {MAX_UNPACKED >> 20} MiB of JSON")
    return parse_recording(parse_json(text, source), source)

"""Names for places in code: of a stack the frame that says most to the one who wrote the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from memtrace.forensics.trace import Frame

_LIBRARIES = ("site-packages/", "dist-packages/", "/torch/", "/python3", "<frozen", "/aten/", "/c10/", "??")


def place_of(frames: Sequence[Frame]) -> str:
    """Returns file, line and function of the innermost frame outside of libraries, else of the innermost in Python.

    Empty where there is no frame.
    """
    python = [frame for frame in frames if frame.filename.endswith(".py")]
    own = next((frame for frame in python if not _is_library(frame.filename)), None)
    chosen = own or next(iter(python or frames), None)
    if chosen is None:
        return ""
    return f"{PurePosixPath(chosen.filename.replace(chr(92), '/')).name}:{chosen.line} {chosen.name}"


def _is_library(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return any(part in path for part in _LIBRARIES) or path.startswith("torch/")

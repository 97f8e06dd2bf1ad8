"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and renames it: a reader sees the old one or the new one.

    The draft's name begins with a dot and ends in the process's number: no glob for the file matches it.

    Args:
        path: where the file goes, in a directory that is there.
        content: text is written in UTF-8; what that cannot carry, as question marks.

    Raises:
        OSError: the file cannot be written; no draft is left then.
    """
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:  # it is gone where it took its place
        with suppress(OSError):
            draft.unlink(missing_ok=True)

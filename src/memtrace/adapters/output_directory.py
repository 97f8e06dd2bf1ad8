"""Where a run under Trainer logs, so that the log is not uploaded with the model."""

from __future__ import annotations

from pathlib import Path

NAME = "memtrace"
TARGET = "_memtrace"
"""Trainer leaves out what begins with an underscore when it uploads its output directory, and nothing else of ours."""


def log_directory(output_dir: Path) -> Path:
    """Returns `<output_dir>/memtrace`, a link to `_memtrace` beside it.

    `push_to_hub` uploads the whole output directory but for checkpoints and what begins with an underscore; it lists
    no directory behind a link. A directory that is there already is used as it is, and where links cannot be made
    the directory is a plain one: then it is uploaded.

    Args:
        output_dir: what Trainer writes to; made where it is missing.
    """
    link, target = output_dir / NAME, output_dir / TARGET
    if link.is_dir():
        return link
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():  # one that is there waits for its target
            link.symlink_to(TARGET, target_is_directory=True)
    except (OSError, NotImplementedError):
        pass  # another rank was faster, or links cannot be made here; a directory that cannot be made is told of later
    return link

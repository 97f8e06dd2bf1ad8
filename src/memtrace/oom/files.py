"""Where OOM reports go: a JSON and a Markdown file each, and no more of them than asked for."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from memtrace.errors import OutputError
from memtrace.oom.document import encode
from memtrace.oom.markdown import render_markdown
from memtrace.oom_report import OomReport


def report_path(directory: str | os.PathLike[str], report: OomReport) -> Path:
    """Returns the Markdown file of a report: its name has the rank and the time, UTC to the millisecond."""
    moment = datetime.fromtimestamp(report.unix_seconds, UTC)
    stamp = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03d}Z"
    return Path(directory) / f"oom-rank{report.rank}-{stamp}.md"


def write_report(directory: str | os.PathLike[str], report: OomReport, *, keep: int) -> Path:
    """Writes a report as Markdown and JSON, and deletes the oldest of its rank beyond `keep`.

    A report of the same time is replaced. Each file is written beside its place and renamed, so that it is there whole
    or not at all.

    Returns:
        The Markdown file; the JSON file differs in the suffix.

    Raises:
        OutputError: the directory cannot be made or the files cannot be written.
    """
    path = report_path(directory, report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((path.with_suffix(".json"), encode(report)), (path, render_markdown(report))):
            draft = file.with_name(f".{file.name}.tmp")
            try:
                draft.write_text(text, encoding="utf-8", errors="replace")
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)
        _delete_oldest(path.parent, report.rank, keep)
    except OSError as error:
        raise OutputError(f"the OOM report {path} cannot be written: {error.strerror or error}") from error
    return path


def _delete_oldest(directory: Path, rank: int, keep: int) -> None:
    stamps = sorted(file.stem for file in directory.glob(f"oom-rank{rank}-*.json"))
    for stem in stamps[: max(len(stamps) - keep, 0)]:
        for suffix in (".json", ".md"):
            (directory / f"{stem}{suffix}").unlink(missing_ok=True)

"""Where OOM reports go: a JSON and a Markdown file each, and no more of them than asked for.

A report that no exception has followed yet is marked in its name. There is one of that kind for each rank: it makes
room for the next one, and for the report that completes it, and takes no room from others.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from memtrace.errors import OutputError
from memtrace.oom.markdown import render_markdown
from memtrace.record.oom.document import encode
from memtrace.record.oom.report import OomReport
from memtrace.record.whole_file import write_whole

_PENDING = "-pending"


def report_path(directory: str | os.PathLike[str], report: OomReport) -> Path:
    """Returns the Markdown file of a report: its name has the rank and the time, UTC to the millisecond.

    A pending report's name ends in `-pending`.
    """
    moment = datetime.fromtimestamp(report.unix_seconds, UTC)
    stamp = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03d}Z"
    return Path(directory) / f"oom-rank{report.rank}-{stamp}{_PENDING if report.request.pending else ''}.md"


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
            write_whole(file, text)
        _make_room(path, report, keep)
    except OSError as error:
        raise OutputError(f"the OOM report {path} cannot be written: {error.strerror or error}") from error
    return path


def _make_room(written: Path, report: OomReport, keep: int) -> None:
    stems = sorted(file.stem for file in written.parent.glob(f"oom-rank{report.rank}-*.json"))
    pending = [stem for stem in stems if stem.endswith(_PENDING)]
    settled = [stem for stem in stems if not stem.endswith(_PENDING)]
    if report.request.pending:
        surplus = [stem for stem in pending if stem != written.stem]
    else:
        surplus = [f"{written.stem}{_PENDING}", *settled[: max(len(settled) - keep, 0)]]
    for stem in surplus:
        for suffix in (".json", ".md"):
            written.with_name(f"{stem}{suffix}").unlink(missing_ok=True)

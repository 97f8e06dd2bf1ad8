"""The text file: the metrics of a rank where nobody scrapes it, for the textfile collector of node_exporter.

Files of several runs, those of one name too, lie in one directory: each has the run and the launch in its name, and in
the labels of every series. Its first line is a comment that says which process has left it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from prometheus_client import generate_latest

from memtrace.errors import LogFormatError, OutputError
from memtrace.exporters.claims import safe_name
from memtrace.exporters.prometheus import registry_of
from memtrace.record.process import Process
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot
from memtrace.record.strict_json import Fields, parse_json
from memtrace.record.whole_file import write_whole

KEPT_SECONDS = 3600.0
"""How long a run's file stays after its end, at least: as long as the alerts remember what has ended."""

_MARK = b"# memtrace.textfile/1 "


def textfile_path(directory: str | os.PathLike[str], identity: RunIdentity) -> Path:
    """Returns where a rank leaves its metrics in the directory of a textfile collector.

    The name has those characters of the run and of its launch that every file system takes, and tells those apart that
    differ in others.
    """
    parts = ["memtrace", _distinct(identity.run_name), *([_distinct(identity.run_id)] if identity.run_id else [])]
    return Path(directory) / f"{'-'.join(parts)}-rank{identity.rank}.prom"


def write_textfile(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Writes a snapshot for the textfile collector of node_exporter, which reads files ending in `.prom`.

    Every series has the labels `run` and `run_id`; there is no `memtrace_run_info`. The file is written beside its
    place and renamed: a reader sees the old one or the new one. Its directory is made where it is missing.

    Raises:
        OutputError: the file cannot be written.
    """
    target, process = Path(path), Process.of(os.getpid())
    document = {
        "run": snapshot.identity.run_name,
        "host": process.host,
        "pid": process.pid,
        "process_start": process.start_unix_seconds,
        "state": snapshot.state.value,
    }
    metrics = generate_latest(registry_of(lambda: snapshot, name_run=True))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, _MARK + json.dumps(document).encode() + b"\n" + metrics)
    except OSError as error:
        raise OutputError(f"the metrics file {target} cannot be written: {error.strerror or error}") from error


def clear_ended(directory: str | os.PathLike[str], run_name: str) -> None:
    """Removes the files of earlier launches of a run that have ended an hour ago or longer.

    Those whose process is gone without a word count from when they were last written. What another machine has left,
    and what cannot be read or removed, stays.
    """
    for path in Path(directory).glob("memtrace-*-rank*.prom"):
        with suppress(OSError, LogFormatError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS and _is_ended(path, run_name):
                path.unlink()


def _is_ended(path: Path, run_name: str) -> bool:
    with path.open("rb") as file:
        line = file.readline()
    if not line.startswith(_MARK):
        return False
    found = Fields.of(parse_json(line.removeprefix(_MARK), str(path)), str(path))
    process = Process(
        host=found.text("host"), pid=found.integer("pid"), start_unix_seconds=found.number("process_start")
    )
    alive = process.is_alive()
    over = found.word("state", RunState) is not RunState.RUNNING
    return found.text("run") == run_name and alive is not None and (over or not alive)


def _distinct(text: str) -> str:
    """Returns a text as part of a file name, with a hash where characters had to go."""
    name = safe_name(text)
    return name if name == text else f"{name}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"

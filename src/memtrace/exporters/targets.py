"""The target file: how a Prometheus with file-based discovery finds the endpoint of each rank.

scrape_configs:
  - job_name: memtrace
    file_sd_configs:
      - files: ["/path/to/runs/*/target-rank*.json"]
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from memtrace.errors import LogFormatError, OutputError
from memtrace.record.process import Process
from memtrace.record.snapshot import RunState
from memtrace.record.strict_json import Fields, parse_json
from memtrace.record.whole_file import write_whole

_EVERY_ADDRESS = ("0.0.0.0", "::")
"""What an endpoint that listens everywhere calls itself; others reach it by the name of the machine."""
_META = "__meta_memtrace_"
"""Prometheus drops such labels once a target is relabelled: they make no series and no new target."""


def target_path(directory: Path, rank: int) -> Path:
    """Returns where a rank's target file is in the log directory of a run."""
    return directory / f"target-rank{rank}.json"


class TargetFile:
    """A target file that is there while the endpoint is.

    It appears at once and whole, in place of one that a killed run has left at the same path. `close()` removes it, or
    leaves it without a target but with the state in which the run has ended; a file that another process has taken over
    is left alone. What tells a stale file from a live one, process and state, are labels that discovery alone sees
    (`__meta_memtrace_...`).

    Args:
        path: the file; its directory is made.
        url: address of the metrics, as the endpoint gives it.
        run_id: the launch.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, url: str, run_id: str = "") -> None:
        parts = urlsplit(url)
        target = f"{socket.gethostname()}:{parts.port}" if parts.hostname in _EVERY_ADDRESS else parts.netloc
        process = Process.of(os.getpid())
        self._labels = {
            "__scheme__": parts.scheme,
            "__metrics_path__": parts.path,
            f"{_META}run_id": run_id,
            f"{_META}host": process.host,
            f"{_META}pid": str(process.pid),
            f"{_META}process_start": str(process.start_unix_seconds),
            f"{_META}state": RunState.RUNNING.value,
        }
        self._path = path
        self._text = _document([target], self._labels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self._text)
        except OSError as error:
            raise OutputError(f"target file {path} cannot be written: {error.strerror}") from error

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def close(self, state: RunState = RunState.OK) -> None:
        """Removes the file after an end that is well, else takes the target out of it; a second call does nothing."""
        # The end of a run is no time to fail it; a target that stays is seen as down.
        with suppress(OSError, UnicodeDecodeError):
            if self._path.read_text(encoding="utf-8") != self._text:
                return
            if state is RunState.OK:
                self._path.unlink()
            else:
                write_whole(self._path, _document([], self._labels | {f"{_META}state": state.value}))


def clear_stale(directory: Path) -> None:
    """Removes the target files that processes of this machine have left in a directory, and that are gone since."""
    for path in directory.glob("target-rank*.json"):
        # What cannot be read or removed is seen as down, and what is no target file of ours is nobody's business.
        with suppress(OSError, LogFormatError):
            if _is_stale(path):
                path.unlink()


def _is_stale(path: Path) -> bool:
    groups = parse_json(path.read_bytes(), str(path))
    labels = Fields.of(groups[0] if isinstance(groups, list) and groups else None, str(path)).object("labels")
    pid, start = labels.text(f"{_META}pid"), labels.text(f"{_META}process_start")
    if not pid.isdecimal() or not re.fullmatch(r"[0-9.e+]+", start):
        return False
    process = Process(host=labels.text(f"{_META}host"), pid=int(pid), start_unix_seconds=float(start))
    return process.is_alive() is False and labels.text(f"{_META}state") == RunState.RUNNING


def _document(targets: list[str], labels: dict[str, str]) -> str:
    return json.dumps([{"targets": targets, "labels": labels}]) + "\n"

"""The target file: how a Prometheus with file-based discovery finds the endpoint of each rank.

scrape_configs:
  - job_name: memtrace
    file_sd_configs:
      - files: ["/path/to/runs/*/target-rank*.json"]
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from memtrace.errors import OutputError

_EVERY_ADDRESS = ("0.0.0.0", "::")
"""What an endpoint that listens everywhere calls itself; others reach it by the name of the machine."""


def target_path(directory: Path, rank: int) -> Path:
    """Returns where a rank's target file is in the log directory of a run."""
    return directory / f"target-rank{rank}.json"


class TargetFile:
    """A target file that is there while the endpoint is.

    It appears at once and whole, in place of one that a killed run has left at the same path. `close()` removes it,
    unless another process has taken the path over.

    Args:
        path: the file; its directory is made.
        url: address of the metrics, as the endpoint gives it.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, url: str) -> None:
        parts = urlsplit(url)
        target = f"{socket.gethostname()}:{parts.port}" if parts.hostname in _EVERY_ADDRESS else parts.netloc
        labels = {"__scheme__": parts.scheme, "__metrics_path__": parts.path}
        self._path = path
        self._text = json.dumps([{"targets": [target], "labels": labels}]) + "\n"
        partial = path.with_name(f".{path.name}.{os.getpid()}")  # no glob for target files matches it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self._text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(f"target file {path} cannot be written: {error.strerror}") from error

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def close(self) -> None:
        """Removes the file if it is still this endpoint's; a second call does nothing."""
        # The end of a run is no time to fail it; a target that stays is seen as down.
        with suppress(OSError, UnicodeDecodeError):
            if self._path.read_text(encoding="utf-8") == self._text:
                self._path.unlink()

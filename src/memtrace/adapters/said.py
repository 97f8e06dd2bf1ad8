"""What a run says to its user: on stderr where metrics and log are, at the end the table; a drawing in a notebook."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from memtrace.exporters.table import render_text
from memtrace.record.snapshot import Snapshot


def say_where(url: str | None, log: Path | None) -> None:
    """Says in one line where metrics and step log are; nothing where there are none."""
    parts = [f"metrics at {url}" if url else "", f"step log {log}" if log else ""]
    if any(parts):
        _write("memtrace: " + ", ".join(part for part in parts if part))


def show_table(snapshot: Snapshot) -> None:
    """Writes the table of the last traced step, of the last one where none was traced; nothing before the first."""
    record = snapshot.latest_traced or snapshot.latest
    if record is not None:
        _write(render_text(record))


def show_in_notebook(drawn: object) -> bool:
    """Shows what draws itself below the cell that runs; returns False where no IPython does."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return False
    ipython.display.display(drawn)
    return True


def _write(text: str) -> None:
    """Writes a text above the progress bars that are still being drawn. A stderr that takes none is no fault."""
    if sys.stderr is None:  # tqdm writes to stdout then
        return
    tqdm = sys.modules.get("tqdm")
    with suppress(OSError, ValueError):
        if tqdm is not None and hasattr(tqdm, "tqdm"):
            tqdm.tqdm.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")

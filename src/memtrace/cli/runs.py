"""`memtrace runs`: a catalogue of the runs below a directory."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from memtrace.cli.show import console
from memtrace.errors import LogFormatError
from memtrace.exporters.run_directory.run_catalogue import RunSummary, find_runs
from memtrace.exporters.run_directory.run_file import TRAINERS_DIRECTORIES
from memtrace.exporters.table import printable
from memtrace.record.units import format_bytes

_ORDERS: Mapping[str, Callable[[RunSummary], Any]] = {
    "when": lambda run: -run.begun_unix_seconds,
    "name": lambda run: (run.name, -run.begun_unix_seconds),
    "peak": lambda run: -(run.figures.peak_bytes or 0),
    "headroom": lambda run: math.inf if run.headroom_ratio is None else run.headroom_ratio,
    "ooms": lambda run: (-run.figures.ooms, -run.begun_unix_seconds),
}


class Runs:
    """Lists runs."""

    name = "runs"
    summary = "List the runs below a directory: when, model, ranks, steps, peak, headroom, OOMs, how each ended."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the directory, the order and the form."""
        parser.add_argument("directory", type=Path, metavar="DIR", help="a directory that has runs in or below it")
        parser.add_argument(
            "--sort",
            choices=[*_ORDERS],
            default="when",
            help="the newest first (default), the names in order, the highest peak, the least headroom, the most OOMs",
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the catalogue.

        Raises:
            LogFormatError: the directory cannot be read, or has no run.
        """
        runs = sorted(find_runs(arguments.directory), key=_ORDERS[arguments.sort])
        if arguments.json:
            print(json.dumps({"schema": "memtrace.runs/1", "runs": [*map(_document, runs)]}, indent=2, allow_nan=False))
            return 0
        if not runs:
            raise LogFormatError(f"{arguments.directory}: there is no run in this directory or below it")
        console().print(_table(runs, arguments.directory))
        return 0


def _table(runs: Sequence[RunSummary], root: Path) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("begun", no_wrap=True)
    for head in ("run", "model"):
        table.add_column(head, overflow="fold", ratio=1)
    for head in ("ranks", "steps", "peak", "headroom", "OOMs"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for run in runs:
        figures = run.figures
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun_unix_seconds)),
            printable(_title(run, root)),
            printable(run.model),
            str(run.ranks) if run.world_size in (None, run.ranks) else f"{run.ranks} of {run.world_size}",
            "" if figures.last_step is None else str(figures.last_step),
            "" if figures.peak_bytes is None else format_bytes(figures.peak_bytes),
            "" if run.headroom_ratio is None else f"{run.headroom_ratio:.0%}",
            str(figures.ooms),
            run.ended,
        )
    return table


def _title(run: RunSummary, root: Path) -> str:
    """Returns the name of a run and where it is, in one word where they are the same."""
    directory = run.directory.parent if run.directory.name in TRAINERS_DIRECTORIES else run.directory
    place = os.path.relpath(directory, root)
    return run.name if place in (".", "..", run.name) else f"{run.name} in {place}"


def _document(run: RunSummary) -> dict[str, Any]:
    return asdict(run) | {"directory": str(run.directory), "headroom_ratio": run.headroom_ratio}

"""`memtrace read`: what an allocator's snapshot means, whoever wrote it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memtrace.cli.show import console, find_logs
from memtrace.errors import ConfigError, OutputError
from memtrace.exporters.drawn.reading_page import render_readings
from memtrace.exporters.reading_table import difference_table, ranks_of_readings, reading_table
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.traces.events import render_trace
from memtrace.exporters.traces.readings import reading_events
from memtrace.record.readings.document import document_of
from memtrace.record.readings.snapshot_reading import SnapshotReading
from memtrace.record.whole_file import write_whole

if TYPE_CHECKING:
    from memtrace.forensics.attribution.expected import ExpectedModel
    from memtrace.forensics.recorded_run import RunRecords
    from memtrace.forensics.snapshot import AllocatorSnapshot
    from memtrace.record.breakdown import StepRecord

_SAID_EACH = 64 << 20
"""Bytes of a pickle between two lines about how far reading it is."""


class Read:
    """Reads snapshots of `torch.cuda.memory._dump_snapshot`."""

    name = "read"
    summary = "Read an allocator's snapshot: what memory was for at the peak, at the end and when a request failed."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the snapshots, what else is known of the model, and what is written."""
        parser.add_argument(
            "snapshots",
            type=Path,
            nargs="+",
            metavar="SNAPSHOT.pickle",
            help="what torch.cuda.memory._dump_snapshot() wrote, plain or gzip'ed; of several the peaks",
        )
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="the model's config.json, its model.safetensors.index.json or a file of safetensors, or a directory "
            "that has one: blocks are told by its sizes",
        )
        parser.add_argument(
            "--run",
            type=Path,
            metavar="RUN_DIR",
            dest="run_directory",
            help="what memtrace has written of the same process, a step log or the directory that has them: its steps, "
            "and what it has traced, tell what blocks are for; a run of another process is refused",
        )
        parser.add_argument(
            "--compare", action="store_true", help="show by how much the second of two snapshots is larger"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "--html", type=Path, metavar="OUT.html", help="write the timeline and the table of each device as a page"
        )
        parser.add_argument(
            "--perfetto",
            type=Path,
            metavar="OUT.json",
            help="write memory by category over time as a trace, for https://ui.perfetto.dev",
        )
        parser.add_argument(
            "--annotate",
            type=Path,
            metavar="OUT.pickle",
            help="write the snapshot with categories, for https://pytorch.org/memory_viz",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints what the snapshots say.

        Raises:
            ConfigError: two snapshots are needed for a comparison, one to be annotated, an output is one of them, the
                model is not known, or the run has no step or is of another process.
            LogFormatError: a snapshot or a step log cannot be understood.
            OutputError: a file cannot be read or written.
            PlanError: the configuration names no model.
        """
        from memtrace.forensics.attribution.expected import expected_model  # noqa: PLC0415 - torch takes a second to import

        paths: list[Path] = arguments.snapshots
        if arguments.compare and len(paths) != 2:
            raise ConfigError(f"--compare needs two snapshots, got {len(paths)}")
        if arguments.annotate is not None and len(paths) != 1:
            raise ConfigError(f"--annotate needs one snapshot, got {len(paths)}")
        for written in (arguments.html, arguments.perfetto, arguments.annotate):
            if written is not None:
                _check_output(written, paths)
        if arguments.run_directory is not None:
            _check_run(arguments.run_directory)
        model = None if arguments.config is None else expected_model(arguments.config)
        readings = [
            _read(path, name, model, arguments.run_directory, arguments.annotate)
            for path, name in zip(paths, _names(paths), strict=True)
        ]
        if arguments.html is not None:
            _write(arguments.html, render_readings(readings))
        if arguments.perfetto is not None:
            _write(arguments.perfetto, "".join(render_trace(reading_events(readings), {})))
        if arguments.json:
            print(json.dumps(document_of(readings), indent=2, allow_nan=False))
        else:
            _show(readings, compare=arguments.compare)
        return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the names of the files, with as much of their directories as tells them apart: ranks have one each."""
    names: list[str] = []
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({*names}) == len({*paths}):
            break
    return names


def _read(
    path: Path, name: str, model: ExpectedModel | None, run: Path | None, annotated: Path | None
) -> SnapshotReading:
    """Returns what one snapshot says, and lets go of it before the next one is loaded."""
    from memtrace.forensics.loader import load_snapshot  # noqa: PLC0415 - torch takes a second to import
    from memtrace.forensics.reading import read_snapshot  # noqa: PLC0415

    snapshot = load_snapshot(path, _Progress(path))
    runs = () if run is None else [*_records(run, snapshot)]
    try:
        reading = read_snapshot(snapshot, name, model, runs)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if annotated is not None:
        from memtrace.forensics.annotated import write_annotated  # noqa: PLC0415

        write_annotated(snapshot, model, annotated, runs)
    return reading


def _records(run: Path, snapshot: AllocatorSnapshot) -> Iterator[RunRecords]:
    """Yields what each rank has recorded while the histories of a snapshot were, and its first and last step."""
    from memtrace.forensics.recorded_run import RunRecords  # noqa: PLC0415 - torch takes a second to import

    times = [(trace.times_us[0], trace.times_us[-1]) for trace in snapshot.traces if len(trace)]
    begin, end = (min(begin for begin, _ in times), max(end for _, end in times)) if times else (0, 0)
    for log in find_logs(run):
        kept: list[StepRecord] = []
        last = None
        for record in read_step_log(log):
            began = record.unix_seconds - (record.step_seconds or 0.0)
            if not kept or (begin / 1e6 <= record.unix_seconds and began <= end / 1e6):
                kept.append(record)
            last = record
        if last is not None and kept[-1] is not last:
            kept.append(last)
        yield RunRecords(name=log.name, records=kept)


def _check_run(run: Path) -> None:
    """Refuses before minutes of reading what no snapshot can be matched with."""
    if not any(next(read_step_log(log), None) for log in find_logs(run)):
        raise ConfigError(f"{run} has no finished step: give the directory or the step log of a run that has one")


def _check_output(path: Path, snapshots: Sequence[Path]) -> None:
    """Refuses before minutes of reading what cannot be written after them, and what would replace a snapshot."""
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.resolve() in {snapshot.resolve() for snapshot in snapshots}:
        raise ConfigError(f"{path} is one of the snapshots: give another name for what is written")


def _write(path: Path, content: str) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _show(readings: list[SnapshotReading], *, compare: bool) -> None:
    if compare:
        console().print(difference_table(*readings))
    elif len(readings) > 1:
        console().print(ranks_of_readings(readings))
    else:
        console().print(reading_table(readings[0]))


class _Progress:
    """Says on stderr how far reading a large file is."""

    def __init__(self, path: Path) -> None:
        self._path, self._said = path, 0

    def __call__(self, done: int) -> None:
        if done >= self._said + _SAID_EACH:
            self._said = done
            print(f"memtrace: {self._path.name}: {done >> 20:,} MiB read", file=sys.stderr)

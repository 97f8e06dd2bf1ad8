"""`memtrace export`: a run as a file for another viewer, or to a collector of OpenTelemetry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from memtrace.cli.run_logs import RankLog, rank_logs
from memtrace.errors import ConfigError, LogFormatError, OutputError
from memtrace.exporters.csv_table import write_csv, write_header
from memtrace.exporters.run_directory.run_file import name_of
from memtrace.exporters.run_directory.timeline_file import read_timelines
from memtrace.exporters.table import printable
from memtrace.exporters.traces.events import RankTrace, begin_ns, render_trace, timeline_of, trace_events
from memtrace.exporters.traces.profiler import PATTERNS, ProfilerTrace, read_profiler_trace
from memtrace.record.oom.document import parse_report
from memtrace.record.strict_json import parse_json


class Export:
    """Writes what the log directory of a run tells in the form of another tool."""

    name = "export"
    summary = "Export a run: a trace for Perfetto, a table as CSV, metrics to OpenTelemetry."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the run, the form, and what belongs to each."""
        parser.add_argument("run", type=Path, metavar="LOG|RUN_DIR", help="a step log, or the directory that has them")
        parser.add_argument("--rank", type=int, metavar="R", help="only this rank; by default all")
        form = parser.add_mutually_exclusive_group(required=True)
        form.add_argument("--perfetto", metavar="FILE", help="a trace for ui.perfetto.dev; - writes to stdout")
        form.add_argument("--csv", metavar="FILE", help="a row for each step, rank, moment and entry; - for stdout")
        form.add_argument(
            "--otlp",
            metavar="ENDPOINT",
            help="push every step to a collector, such as http://localhost:4318; env for what OTEL_* say",
        )
        parser.add_argument(
            "--profiler",
            type=Path,
            metavar="TRACE.json",
            help="with --perfetto: a trace of torch.profiler to show beside the steps that it covers; by default the "
            "one *.pt.trace.json in the directory of the run",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Exports the run; what is to be known of the result goes to stderr.

        Raises:
            ConfigError: the rank has no log, or an option does not belong to the form.
            LogFormatError: a log, a timeline or the profiler's trace cannot be read, or they have no step in common.
            OutputError: the file cannot be written, or the collector does not take the metrics.
        """
        if arguments.profiler is not None and arguments.perfetto is None:
            raise ConfigError("--profiler belongs to --perfetto: the other forms have no events of time")
        logs = rank_logs(arguments.run, arguments.rank)
        named = logs[0].path.parent if arguments.run.is_dir() else arguments.run
        name = logs[0].name(name_of(named.resolve()))
        if arguments.perfetto is not None:
            _perfetto(arguments.perfetto, name, logs, arguments.profiler)
        elif arguments.csv is not None:
            with _output(arguments.csv) as file:
                write_header(file)
                for log in logs:
                    write_csv(file, log.name(name), log.records())
        else:
            from memtrace.cli.export.push import push_run  # noqa: PLC0415 - an extra, and a third of a second

            push_run(arguments.otlp, name, logs)
        return 0


@contextmanager
def _output(destination: str) -> Iterator[TextIO]:
    """Returns stdout for `-`, else the file, in UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    if destination == "-":
        yield sys.stdout
        return
    try:
        with Path(destination).open("w", encoding="utf-8", errors="replace", newline="") as file:
            yield file
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{destination} cannot be written: {error.strerror or error}") from error


def _perfetto(destination: str, name: str, logs: list[RankLog], wanted: Path | None) -> None:
    profiler = _profiler_trace(logs[0].path.parent, wanted)
    ranks = [_rank(log, log.name(name)) for log in logs]
    if profiler is not None:
        covered = [_covered(rank, profiler) for rank in ranks]
        if any(rank.records for rank in covered):
            ranks = covered
        elif wanted is not None:
            raise LogFormatError(
                f"{wanted}: the trace covers no step of {printable(name)}: it is of another time or another run"
            )
        else:
            profiler = None
    if profiler is None:
        base_ns = min(begin_ns(rank.records[0]) for rank in ranks)
        head: dict[str, Any] = {"baseTimeNanoseconds": base_ns}
        events: Iterator[Any] = iter(())
    else:
        base_ns, head, events = profiler.base_ns, dict(profiler.head), iter(profiler.events)
    with _output(destination) as file:
        file.writelines(render_trace(_all_events(events, ranks, base_ns), head))


def _all_events(others: Iterator[Any], ranks: list[RankTrace], base_ns: int) -> Iterator[Any]:
    yield from others
    for rank in ranks:
        yield from trace_events(rank, base_ns)


def _profiler_trace(directory: Path, wanted: Path | None) -> ProfilerTrace | None:
    """Returns the trace that was named, or the only one beside the logs."""
    if wanted is not None:
        return read_profiler_trace(wanted)
    beside = [path for pattern in PATTERNS for path in sorted(directory.glob(pattern))]
    if len(beside) > 1:
        _say(f"{directory} has {len(beside)} traces of torch.profiler: name one with --profiler")
    if len(beside) != 1:
        return None
    _say(f"with {beside[0]}")
    return read_profiler_trace(beside[0])


def _covered(rank: RankTrace, profiler: ProfilerTrace) -> RankTrace:
    """Returns the steps that lie within the profiler's trace, in whole or in part."""
    records = [
        record
        for record in rank.records
        if begin_ns(record) < profiler.last_ns and record.unix_seconds * 1e9 > profiler.first_ns
    ]
    return replace(rank, records=records)


def _rank(log: RankLog, name: str) -> RankTrace:
    records = log.records()
    by_step = {record.step: record for record in records}
    curves, others = {}, 0
    for timeline in read_timelines(log.path.parent, log.rank):
        record = by_step.get(timeline.step)
        if record is not None and timeline_of(record, timeline.curve):
            curves[timeline.step] = timeline.curve
        else:
            others += 1
    if others and not curves:
        _say(f"no timeline of rank {log.rank} is of a step in its log: left out")
    return RankTrace(
        rank=log.rank,
        title=f"memtrace: {name}, rank {log.rank} on {records[-1].device}",
        records=records,
        curves=curves,
        failures=list(_failures(log)),
    )


def _failures(log: RankLog) -> Iterator[float]:
    """Yields when allocations of the launch failed, as the reports beside the log say."""
    for path in sorted(log.path.parent.glob(f"oom-rank{log.rank}-*.json")):
        with suppress(OSError, LogFormatError):
            report = parse_report(parse_json(path.read_bytes(), str(path)), str(path))
            if report.run_id == log.run_id:
                yield report.unix_seconds


def _say(words: str) -> None:
    print(f"memtrace: {words}", file=sys.stderr)

"""`memtrace show`: the table of one step, or the peaks of all ranks side by side."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from memtrace.errors import ConfigError, LogFormatError
from memtrace.exporters.ranks import ranks_table
from memtrace.exporters.run_directory.run_file import run_files
from memtrace.exporters.run_directory.steplog import begins_a_run, read_step_log, step_log_path
from memtrace.exporters.table import TABLE_WIDTH, printable, step_table
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.snapshot import RunState

_RECENT = 100
"""Records with a peak that are kept of each log, to find a step that all ranks have."""
_NAMED = 5
"""Directories that a message names, the newest ones."""
_LOG_NAME = re.compile(r"steps-rank(\d{1,9})\.jsonl(?:\.1)?")

_Log = TypeVar("_Log")
"""What stands for the log of a rank."""


class Show:
    """Shows what memory was for in a run that is going on or has ended."""

    name = "show"
    summary = "Show what memory was for in a step: the table of one rank, or all ranks side by side."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the log and what to show of it."""
        parser.add_argument(
            "log", type=Path, metavar="LOG|RUN_DIR", help="a step log, or the directory that has them, or the one above"
        )
        parser.add_argument(
            "--step", type=int, metavar="N", help="step to show; by default the last one whose peak is known"
        )
        parser.add_argument("--rank", type=int, metavar="R", help="show the table of one rank of a run directory")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the table.

        Raises:
            ConfigError: the rank or the step is not in the log.
            LogFormatError: the log cannot be read.
        """
        logs = find_logs(arguments.log)
        if arguments.rank is not None:
            logs = [log for log in logs if log == step_log_path(log.parent, arguments.rank)]
            if not logs:
                raise ConfigError(f"{arguments.log} has no log of rank {arguments.rank}")
        records = choose_records(logs, arguments.step)
        table = step_table(*records.values()) if len(records) == 1 else ranks_table(records)
        console().print(table)
        for words in endings(logs, records, good=False):
            console().print(words, style="yellow", markup=False, highlight=False)
        return 0


def endings(logs: Iterable[Path], ranks: Iterable[int], *, good: bool) -> Iterator[str]:
    """Yields a line for the ranks that have ended in the same way; also for those that have ended well if `good`."""
    alike: dict[str, list[int]] = {}
    for directory in sorted({log.parent for log in logs}):
        for status in run_files(directory):
            if status.rank in ranks and not status.is_live and (good or status.state is not RunState.OK):
                how = printable(f"of {status.run_name}: {status.words} (launch {status.run_id})")
                alike.setdefault(how, []).append(status.rank)
    for how, found in alike.items():
        yield f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found))} {how}"


def find_logs(path: Path) -> list[Path]:
    """Returns the step logs that a path stands for: the file, or those of a directory in the order of the ranks.

    A directory without any stands for the one directory in it that has some: Trainer's output directory, for example.

    Raises:
        LogFormatError: a directory has none, or several below it have, or it cannot be read.
    """
    if not path.is_dir():
        return [path]
    found = _logs_in(path)
    if found:
        return found
    below: dict[Path, list[Path]] = {}
    for each in sorted(path.iterdir()):
        with suppress(LogFormatError):
            if each.is_dir() and (logs := _logs_in(each)):
                below.setdefault(each.resolve(), logs)
    if not below:
        raise LogFormatError(
            f"{path}: there is no step log in this directory or one below, no steps-rank<R>.jsonl; "
            f"`memtrace runs {path}` lists those further down"
        )
    if len(below) > 1:
        newest = sorted((logs[0].parent for logs in below.values()), key=_modified, reverse=True)
        runs = ", ".join(map(str, newest[:_NAMED])) + (", and others" if len(newest) > _NAMED else "")
        raise LogFormatError(f"{path}: several directories below it have step logs, name one of them: {runs}")
    return next(iter(below.values()))


def _modified(directory: Path) -> float:
    """Returns when a file of the directory was last made or renamed; 0 where it is gone."""
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0


def _logs_in(directory: Path) -> list[Path]:
    try:
        names = [entry.name for entry in directory.iterdir()]
    except OSError as error:
        raise LogFormatError(f"{directory}: the directory cannot be read: {error.strerror}") from error
    ranks = {int(found[1]) for name in names if (found := _LOG_NAME.fullmatch(name))}
    return [step_log_path(directory, rank) for rank in sorted(ranks)]


def choose_records(logs: Iterable[Path], step: int | None) -> dict[int, StepRecord]:
    """Returns one record of each rank: of the given step, else of the newest step whose peak all ranks know.

    Where they share no such step, or know no peak, it is each rank's newest record, one with a peak before others.
    A log without records yet is left out.

    Raises:
        ConfigError: a log does not have the step.
        LogFormatError: a log cannot be read, or none has a record.
    """
    recent = {log: _recent(log, step) for log in logs}
    with_records = of_the_newest_run({log: records for log, records in recent.items() if records})
    if not with_records:
        raise LogFormatError(f"{', '.join(map(str, recent))}: there is no finished step yet")
    common = set.intersection(*(set(records) for records in with_records.values()))
    chosen = [records[max(common or records)] for records in with_records.values()]
    return {record.rank: record for record in chosen}


def of_the_newest_run(found: Mapping[_Log, Mapping[int, StepRecord]]) -> dict[_Log, Mapping[int, StepRecord]]:
    """Leaves out ranks whose logs are all of earlier launches: the newest one has fewer ranks.

    Told by the launch and by the time, since the machines of one launch may have no id in common.
    """
    if not found:
        return {}
    last = {log: records[max(records)] for log, records in found.items()}
    newest = max(last, key=lambda log: last[log].unix_seconds)
    first, launch = found[newest][min(found[newest])], last[newest].run_id
    begun = first.unix_seconds - (first.step_seconds or 0.0)
    return {
        log: records
        for log, records in found.items()
        if (launch and last[log].run_id == launch) or last[log].unix_seconds >= begun
    }


def _recent(log: Path, step: int | None) -> dict[int, StepRecord]:
    """Returns records of one log by step: the wanted one, else the newest traced ones, else the newest of all."""
    peaks: deque[StepRecord] = deque(maxlen=_RECENT)
    last: StepRecord | None = None
    for record in read_step_log(log):
        if last is not None and begins_a_run(record, last):
            peaks.clear()
        last = record
        if record.step == step or (step is None and record.traced and Moment.PEAK in record.moments):
            peaks.append(record)
    if step is not None and last is not None and not peaks:
        raise ConfigError(f"{log} has no step {step}; its last one is step {last.step}")
    newest = peaks or ([last] if last is not None else [])
    return {record.step: record for record in newest}


def console() -> Console:
    """Returns where commands print: as wide as the terminal, or `TABLE_WIDTH` where the output is none."""
    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else TABLE_WIDTH
    return Console(width=fixed)

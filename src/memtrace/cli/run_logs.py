"""The step logs of the newest launch in a run directory, one rank at a time: a log may be larger than what fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memtrace.cli.show import find_logs, of_the_newest_run
from memtrace.errors import ConfigError, LogFormatError
from memtrace.exporters.run_directory.run_file import RunStatus, read_run_file, run_file_path
from memtrace.exporters.run_directory.steplog import begins_a_run, newest_run, read_step_log
from memtrace.record.breakdown import StepRecord


@dataclass(frozen=True, slots=True)
class RankLog:
    """The log of one rank."""

    path: Path
    rank: int
    run_id: str
    """The launch that the log ends with; empty in logs of older versions."""

    def records(self) -> list[StepRecord]:
        """Returns the records of the newest launch, in order; reads the log anew."""
        return newest_run(read_step_log(self.path))

    def name(self, otherwise: str) -> str:
        """Returns the name of the run, as its run file says it; else the other one."""
        status = self.status()
        return otherwise if status is None else status.run_name

    def status(self) -> RunStatus | None:
        """Returns what the run file of that launch says; None where there is none, or that of another launch."""
        try:
            found = read_run_file(run_file_path(self.path.parent, self.rank))
        except LogFormatError:
            return None
        return found if found is not None and found.run_id == self.run_id else None


def rank_logs(path: Path, rank: int | None = None) -> list[RankLog]:
    """Returns the logs of the newest launch that a path stands for, in the order of the ranks.

    Args:
        path: a step log, the directory that has them, or the one above.
        rank: the only one that is wanted; None wants all.

    Raises:
        ConfigError: the rank has no log.
        LogFormatError: a log cannot be read, or none has a record.
    """
    ends = {log: ends for log in find_logs(path) if (ends := _first_and_last(read_step_log(log)))}
    if not ends:
        raise LogFormatError(f"{path}: there is no finished step yet")
    found = [
        RankLog(path=log, rank=last.rank, run_id=last.run_id)
        for log, records in of_the_newest_run(ends).items()
        for last in [records[max(records)]]
    ]
    chosen = [log for log in found if rank in (None, log.rank)]
    if not chosen:
        raise ConfigError(f"{path} has no log of rank {rank}, only of {', '.join(str(log.rank) for log in found)}")
    return chosen


def _first_and_last(records: Iterable[StepRecord]) -> dict[int, StepRecord]:
    """Returns the first and the last record of the newest launch by step."""
    first = last = None
    for record in records:
        if first is None or last is None or begins_a_run(record, last):
            first = record
        last = record
    return {record.step: record for record in (first, last) if record is not None}

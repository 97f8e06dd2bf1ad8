"""The runs below a directory, one line each, from their run files: no log is read whole, however long it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from memtrace.errors import LogFormatError
from memtrace.exporters.run_directory.run_file import RunFigures, RunStatus, name_of, run_files
from memtrace.record.breakdown import StepRecord
from memtrace.record.schema import parse_step
from memtrace.record.strict_json import parse_json

_TAIL_BYTES = 128 * 1024
"""What is read of a step log's end, where the run file has no figures: some dozens of steps."""
_RUN_FILES, _STEP_LOGS = "run-rank*.json", "steps-rank*.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The newest launch in one directory."""

    directory: Path
    name: str
    run_id: str
    """Empty in logs of older versions."""
    model: str
    """Empty where the run did not say."""
    begun_unix_seconds: float
    ranks: int
    """Ranks that have left files here."""
    world_size: int | None
    """Processes that the run has in all; None where it did not say."""
    figures: RunFigures
    """The furthest step, the failed allocations of all ranks, and peak and capacity of the fullest rank. Those of a run
    that has left no figures are of the last steps of its logs."""
    ended: str
    """How it has ended, or that it is running, for people."""

    @property
    def headroom_ratio(self) -> float | None:
        """Headroom at the peak: share of the capacity that the highest peak leaves; below 0 where it is above it."""
        peak, capacity = self.figures.peak_bytes, self.figures.capacity_bytes
        return None if peak is None or not capacity else 1 - peak / capacity


def find_runs(root: Path) -> Iterator[RunSummary]:
    """Yields the runs in a directory and below it; what cannot be read, or is no run's, is left out.

    Links to directories are not followed, and directories whose name begins with a dot are not entered.

    Raises:
        LogFormatError: the directory itself cannot be read.
    """
    try:
        os.scandir(root).close()
    except OSError as error:
        raise LogFormatError(f"{root}: the directory cannot be read: {error.strerror}") from error
    for place, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        statuses = [*run_files(Path(place))] if any(fnmatchcase(name, _RUN_FILES) for name in names) else []
        logs = [Path(place, name) for name in sorted(names) if fnmatchcase(name, _STEP_LOGS)]
        found = _of_run_files(Path(place), statuses, logs) if statuses else _of_logs(Path(place), logs)
        if found is not None:
            yield found


def _of_run_files(directory: Path, statuses: Iterable[RunStatus], logs: Iterable[Path]) -> RunSummary:
    newest = max(statuses, key=lambda status: status.begun_unix_seconds)
    launch = [status for status in statuses if status.run_id == newest.run_id]
    figures = [status.figures for status in launch if status.figures.last_step is not None]
    if not figures:
        figures = list(_tails(logs, newest.run_id).values())
    # The worst of how the ranks have ended: one that has failed before those that were fine, or were ended for it.
    first = max(launch, key=lambda status: (_URGENCY.get(status.state.value, 0), not status.is_live))
    return RunSummary(
        directory=directory,
        name=newest.run_name,
        run_id=newest.run_id,
        model=newest.model,
        begun_unix_seconds=min(status.begun_unix_seconds for status in launch),
        ranks=len(launch),
        world_size=newest.world_size,
        figures=_together(figures),
        ended=first.words,
    )


_URGENCY = {"out_of_memory": 4, "exception": 3, "signal": 2, "running": 1}
"""Which state of a rank stands for its run, by how much it says."""


def _of_logs(directory: Path, logs: Iterable[Path]) -> RunSummary | None:
    """Returns a run that has left no run file, as those of older versions."""
    ends = {log: records for log in logs if (records := _tail(log))}
    if not ends:
        return None
    newest = max((records[-1] for records in ends.values()), key=lambda record: record.unix_seconds)
    figures = _tails(ends, newest.run_id)
    return RunSummary(
        directory=directory,
        name=name_of(directory.resolve()),
        run_id=newest.run_id,
        model="",
        begun_unix_seconds=min(records[0].unix_seconds for records in ends.values()),
        ranks=len(figures),
        world_size=None,
        figures=_together(figures.values()),
        ended="not known",
    )


def _together(figures: Iterable[RunFigures]) -> RunFigures:
    """Returns the figures of the ranks as one: see `RunSummary`."""
    known = list(figures) or [RunFigures()]
    fullest = max(known, key=lambda each: each.peak_bytes or 0)
    return RunFigures(
        last_step=max((each.last_step for each in known if each.last_step is not None), default=None),
        ooms=sum(each.ooms for each in known),
        peak_bytes=fullest.peak_bytes,
        capacity_bytes=fullest.capacity_bytes,
    )


def _tails(logs: Iterable[Path], run_id: str) -> dict[Path, RunFigures]:
    """Returns what the ends of logs say of one launch."""
    found: dict[Path, RunFigures] = {}
    for log in logs:
        for record in _tail(log):
            if record.run_id == run_id:
                found[log] = found.get(log, RunFigures()).after(record, None)
    return found


def _tail(log: Path) -> list[StepRecord]:
    """Returns the last records of a log; none where it has none that can be read."""
    try:
        if not log.is_file():  # a pipe would wait for its writer
            return []
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    records: list[StepRecord] = []
    for line in lines:
        with suppress(LogFormatError):
            records.append(parse_step(parse_json(line, str(log)), str(log)))
    return records

"""The run file: which process writes to a run directory, and how the run ended; it outlives the process.

`{"schema": "memtrace.run/1", "run": "...", "run_id": "...", "rank": 0, "world_size": 1, "host": "...", "pid": 12,
"process_start": 1.0, "begun": 1.0, "refreshed": 1.0, "state": "running", "url": "...", "model": "...", "figures":
{"last_step": 12, "ooms": 0, "peak_bytes": N, "capacity_bytes": N}}`, times in seconds since 1970, figures
as of `refreshed`. A run whose state is `running` and whose process is gone was killed outright.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memtrace.errors import LogFormatError, OutputError
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.process import Process
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot
from memtrace.record.strict_json import Fields, read_document
from memtrace.record.whole_file import write_whole

RUN_SCHEMA = "memtrace.run/1"
REFRESH_SECONDS = 30.0
"""How often a run that goes on renews its file, with a step at that."""
TRAINERS_DIRECTORIES = ("memtrace", "_memtrace")
"""Names that a run directory has in Trainer's output directory."""
STALE_SECONDS = 3600.0
"""A run of another machine that has not renewed its file for so long is taken for gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a run has come to so far."""

    last_step: int | None = None
    """Number of the newest step that has a record; None before the first one."""
    ooms: int = 0
    """Failed allocations that the run met as an exception."""
    peak_bytes: int | None = None
    """The highest peak of a step; None where none is known."""
    capacity_bytes: int | None = None
    """What the tensors of the run may take in all, as of that step; None where that is not known."""

    def after(self, record: StepRecord, limit_bytes: int | None) -> RunFigures:
        """Returns the figures after one more step; `limit_bytes` is what the run may use of its device."""
        peak, end = record.moments.get(Moment.PEAK), record.moments.get(Moment.STEP_END)
        identity = RunIdentity(run_name="", device=record.device)
        headroom = Snapshot(identity=identity, latest=record, limit_bytes=limit_bytes).headroom_bytes
        held = None if end is None else end.held_bytes
        held = held if record.allocator is None else record.allocator.allocated_bytes
        known = [size for size in (self.peak_bytes, None if peak is None else peak.held_bytes) if size is not None]
        return RunFigures(
            last_step=record.step,
            ooms=self.ooms,
            peak_bytes=max(known, default=None),
            capacity_bytes=None if headroom is None or held is None else max(0, headroom + held),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a run file holds."""

    run_name: str
    run_id: str
    rank: int
    world_size: int
    process: Process
    begun_unix_seconds: float
    refreshed_unix_seconds: float
    state: RunState = RunState.RUNNING
    url: str | None = None
    """Address of the metrics; None where none are served."""
    model: str = ""
    """What is trained; empty in files of older versions."""
    figures: RunFigures = RunFigures()
    """Without a step in the first seconds of a run, and in files of older versions."""

    @property
    def is_live(self) -> bool:
        """Whether the run goes on, as far as can be told from here."""
        if self.state is not RunState.RUNNING:
            return False
        alive = self.process.is_alive()
        return time.time() - self.refreshed_unix_seconds < STALE_SECONDS if alive is None else alive

    @property
    def words(self) -> str:
        """How the run is, for people."""
        if self.state is RunState.RUNNING and not self.is_live:
            return "gone without a sign of its end: killed, or its machine is lost"
        return self.state.words


def run_file_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank's run file is in the log directory of a run."""
    return Path(directory) / f"run-rank{rank}.json"


def name_of(directory: Path) -> str:
    """Returns the name of a run that has left no run file: that of its directory, or of Trainer's above it."""
    if directory.name in TRAINERS_DIRECTORIES:
        return directory.parent.name
    return directory.stem if directory.is_file() else directory.name


class RunFile:
    """Writes a run file, whole or not at all each time.

    Args:
        path: the file, in a directory that is there.
        identity: which process of which run this is.
        url: address of the metrics; None where none are served.
        limit_bytes: what the run may use of its device; None means all of it.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, identity: RunIdentity, url: str | None, *, limit_bytes: int | None = None) -> None:
        now = time.time()
        self._path = path
        self._limit_bytes = limit_bytes
        self._last: StepRecord | None = None
        self._peak: int | None = None
        self._ooms = 0
        self.status = RunStatus(
            run_name=identity.run_name,
            run_id=identity.run_id,
            rank=identity.rank,
            world_size=identity.world_size,
            process=Process.of(os.getpid()),
            begun_unix_seconds=now,
            refreshed_unix_seconds=now,
            url=url,
            model=identity.model,
        )
        self._write()

    def step(self, record: StepRecord) -> None:
        """Takes in a step, and says that the run still goes on where that was not said lately.

        Raises:
            OutputError: the file cannot be written.
        """
        peak = record.moments.get(Moment.PEAK)
        if peak is not None:
            self._peak = max(self._peak or 0, peak.held_bytes)
        self._last = record
        if record.unix_seconds - self.status.refreshed_unix_seconds >= REFRESH_SECONDS:
            self.status = replace(self.status, refreshed_unix_seconds=record.unix_seconds)
            self._write()

    def count_oom(self) -> None:
        """Takes in a failed allocation; the file says so when it is written next."""
        self._ooms += 1

    def end(self, state: RunState) -> None:
        """Says how the run has ended, unless another run has taken the file over.

        Raises:
            OutputError: the file cannot be written.
        """
        with suppress(LogFormatError):
            found = read_run_file(self._path)
            if found is not None and (found.process, found.run_id) != (self.status.process, self.status.run_id):
                return
        self.status = replace(self.status, state=state, refreshed_unix_seconds=time.time())
        self._write()

    def _write(self) -> None:
        figures = RunFigures(ooms=self._ooms, peak_bytes=self._peak)
        if self._last is not None:
            figures = figures.after(self._last, self._limit_bytes)
        self.status = replace(self.status, figures=figures)
        try:
            write_whole(self._path, json.dumps(_document(self.status)) + "\n")
        except OSError as error:
            raise OutputError(f"the run file {self._path} cannot be written: {error.strerror or error}") from error


def read_run_file(path: str | os.PathLike[str]) -> RunStatus | None:
    """Returns what a run file holds; None where there is none.

    Raises:
        LogFormatError: the file cannot be read, or is no run file.
    """
    run = read_document(path, "run file", RUN_SCHEMA)
    if run is None:
        return None
    return RunStatus(
        run_name=run.text("run"),
        run_id=run.text("run_id"),
        rank=run.integer("rank"),
        world_size=run.integer("world_size"),
        process=Process(host=run.text("host"), pid=run.integer("pid"), start_unix_seconds=run.number("process_start")),
        begun_unix_seconds=run.number("begun"),
        refreshed_unix_seconds=run.number("refreshed"),
        state=run.word("state", RunState),
        url=run.optional("url", Fields.text),
        model=run.optional("model", Fields.text) or "",
        figures=_figures(run.optional("figures", Fields.object)),
    )


def run_files(directory: Path) -> Iterator[RunStatus]:
    """Yields what the run files of a directory hold; those that cannot be read are left out, pipes among them."""
    for path in filter(Path.is_file, sorted(directory.glob("run-rank*.json"))):
        with suppress(LogFormatError):
            status = read_run_file(path)
            if status is not None:
                yield status


def _figures(found: Fields | None) -> RunFigures:
    if found is None:
        return RunFigures()
    return RunFigures(
        last_step=found.optional("last_step", Fields.integer),
        ooms=found.integer("ooms"),
        peak_bytes=found.optional("peak_bytes", Fields.integer),
        capacity_bytes=found.optional("capacity_bytes", Fields.integer),
    )


def _document(status: RunStatus) -> dict[str, object]:
    return {
        "schema": RUN_SCHEMA,
        "run": status.run_name,
        "run_id": status.run_id,
        "rank": status.rank,
        "world_size": status.world_size,
        "host": status.process.host,
        "pid": status.process.pid,
        "process_start": status.process.start_unix_seconds,
        "begun": status.begun_unix_seconds,
        "refreshed": status.refreshed_unix_seconds,
        "state": status.state.value,
        "url": status.url,
        "model": status.model,
        "figures": asdict(status.figures),
    }

"""What a tracer exports while it is attached: metrics endpoint and target file, step log, the text file at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from memtrace.breakdown import StepRecord
from memtrace.config import TracerConfig
from memtrace.errors import OutputError
from memtrace.exporters.prometheus import registry_of, textfile_path, write_textfile
from memtrace.exporters.server import Endpoint, MetricsServer, serve
from memtrace.exporters.steplog import StepLog, step_log_path
from memtrace.exporters.targets import TargetFile, target_path
from memtrace.exporters.timeline_file import write_timeline
from memtrace.oom.files import write_report
from memtrace.oom_report import OomReport
from memtrace.snapshot import RunIdentity, Snapshot

logger = logging.getLogger("memtrace")


class Exports:
    """The outputs that the settings ask for, open until `close()`. Made by `Exports.open()`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._server: MetricsServer | None = None
        self._log: StepLog | None = None
        self._timeline_directory: Path | None = None
        self._leave_textfile: Callable[[], None] = lambda: None
        self._oom_directory: Path | None = None
        self._oom_reports = 0

    @classmethod
    def open(cls, snapshot: Callable[[], Snapshot], identity: RunIdentity, config: TracerConfig, log_dir: Path) -> Self:
        """Opens all outputs, or none.

        Args:
            snapshot: returns the newest state of the tracer; called from the server's threads.
            identity: which process of which run this is.
            config: the settings.
            log_dir: directory of the step log.

        Raises:
            ConfigError: the password file, the certificate or the key cannot be read.
            OutputError: the address, every port tried, or the log directory cannot be used.
        """
        exports = cls()
        with exports._stack as opening:
            if config.textfile_dir is not None:
                path = textfile_path(config.textfile_dir, identity.rank)
                write_textfile(path, snapshot())  # now, so that a directory that cannot be written is told now
                exports._leave_textfile = partial(_leave_textfile, path, snapshot)
                opening.callback(exports._leave_textfile)
            if config.step_log:
                exports._log = StepLog(step_log_path(log_dir, identity.rank), max_bytes=config.log_max_bytes)
                opening.push(exports._log)
                exports._timeline_directory = log_dir
            endpoint = Endpoint.of(config, identity.local_rank)
            if endpoint is not None:
                exports._server = serve(registry_of(snapshot), endpoint)
                opening.push(exports._server)
                if config.step_log:
                    opening.callback(TargetFile(target_path(log_dir, identity.rank), exports._server.url).close)
            if config.oom_reports:
                exports._oom_directory, exports._oom_reports = log_dir, config.oom_reports
            exports._stack = opening.pop_all()
        return exports

    @property
    def url(self) -> str | None:
        """Address of the metrics; None where none are served."""
        return None if self._server is None else self._server.url

    @property
    def log_path(self) -> Path | None:
        """File of the step log; None where none is written."""
        return None if self._log is None else self._log.path

    def write(self, record: StepRecord) -> None:
        """Hands a finished step to the log, and its curve, if it has one, to the timeline."""
        if self._log is not None:
            self._log.write(record)
        if self._timeline_directory is not None:
            try:
                write_timeline(self._timeline_directory, record)
            except OutputError as error:
                self._timeline_directory = None
                logger.warning("memtrace: %s; from now on there is none", error)

    def write_oom(self, report: OomReport) -> Path | None:
        """Writes an OOM report and the text file, since nothing may follow; returns the report's file.

        None where the settings want no reports, and where it cannot be written: that is logged.
        """
        self._leave_textfile()
        if self._oom_directory is None:
            return None
        try:
            return write_report(self._oom_directory, report, keep=self._oom_reports)
        except OutputError as error:
            logger.warning("memtrace: %s", error)
            return None

    def close(self) -> None:
        """Closes the outputs, the last one first; a second call does nothing."""
        self._stack.close()


def _leave_textfile(path: Path, snapshot: Callable[[], Snapshot]) -> None:
    try:
        write_textfile(path, snapshot())
    except OutputError as error:  # the end of a run is no time to fail it
        logger.warning("memtrace: %s", error)

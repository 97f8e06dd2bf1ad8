"""What a tracer exports while it is attached: metrics endpoint and target file, step log, the text file at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
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
    """The outputs that the settings ask for. Made by `Exports.open()`.

    Their life ends with `close()`, which waits for the server's threads, or with `end()`, which waits for nothing: a
    finalizer may call it, on any thread, also at interpreter exit. They belong to the process that opened them: in a
    forked child nothing is written, removed or closed, whatever is called there.
    """

    def __init__(self, snapshot: Callable[[], Snapshot | None], identity: RunIdentity) -> None:
        self._snapshot = snapshot
        self._seen = Snapshot(identity=identity, up=False)
        """The last state for the text file, for when the tracer is gone."""
        self._pid = os.getpid()
        self._ended = False
        self._server: MetricsServer | None = None
        self._target: TargetFile | None = None
        self._log: StepLog | None = None
        self._timeline_directory: Path | None = None
        self._textfile: Path | None = None
        self._oom_directory: Path | None = None
        self._oom_reports = 0

    @classmethod
    def open(
        cls,
        snapshot: Callable[[], Snapshot | None],
        identity: RunIdentity,
        config: TracerConfig,
        log_dir: Path,
    ) -> Self:
        """Opens all outputs, or none.

        Args:
            snapshot: returns the newest state of the tracer; None once the tracer is gone. Called from any thread.
            identity: which process of which run this is.
            config: the settings.
            log_dir: directory of the step log.

        Raises:
            ConfigError: the password file, the certificate or the key cannot be read.
            OutputError: the address, every port tried, or the log directory cannot be used.
        """
        exports = cls(snapshot, identity)
        with ExitStack() as opening:
            opening.callback(exports.close)
            if config.textfile_dir is not None:
                path = textfile_path(config.textfile_dir, identity)
                write_textfile(path, exports._current())  # now, so that a directory that cannot be written is told now
                exports._textfile = path
            if config.step_log:
                exports._log = StepLog(step_log_path(log_dir, identity.rank), max_bytes=config.log_max_bytes)
                exports._timeline_directory = log_dir
            endpoint = Endpoint.of(config, identity.local_rank)
            if endpoint is not None:
                exports._server = serve(registry_of(exports._current), endpoint)
                if config.step_log:
                    exports._target = TargetFile(target_path(log_dir, identity.rank), exports._server.url)
            if config.oom_reports:
                exports._oom_directory, exports._oom_reports = log_dir, config.oom_reports
            opening.pop_all()
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
        if not self._is_ours:
            return
        if self._textfile is not None:
            self._seen = self._current()
        if self._log is not None:
            self._log.write(record)
        if self._timeline_directory is not None:
            try:
                write_timeline(self._timeline_directory, record)
            except OutputError as error:
                self._timeline_directory = None
                logger.warning("memtrace: %s; from now on there is none", error)

    def write_oom(self, report: OomReport) -> Path | None:
        """Writes an OOM report and, since nothing may follow it, the text file; returns the report's file.

        None where the settings want no reports, and where it cannot be written: that is logged.
        """
        if not self._is_ours:
            return None
        path = None
        try:
            if self._oom_directory is not None:
                path = write_report(self._oom_directory, report, keep=self._oom_reports)
        except OutputError as error:
            logger.warning("memtrace: %s", error)
        try:
            if not report.request.pending:
                self._leave_textfile()
        except OutputError as error:
            logger.warning("memtrace: %s", error)
        return path

    def close(self) -> None:
        """Closes the outputs and waits for the server's threads; a second call does nothing."""
        try:
            self._finish(MetricsServer.close)
        except OutputError as error:  # the end of a run is no time to fail it
            logger.warning("memtrace: %s", error)

    def end(self) -> None:
        """Does the same without waiting for any thread, and without a word: the log may be what was interrupted."""
        with suppress(OutputError):
            self._finish(MetricsServer.end)

    @property
    def _is_ours(self) -> bool:
        """Whether this process has opened the outputs, and has not closed them."""
        return not self._ended and self._pid == os.getpid()

    def _finish(self, stop_serving: Callable[[MetricsServer], None]) -> None:
        if not self._is_ours:
            return
        self._ended = True
        with ExitStack() as closing:  # from the last one to the first, whatever one of them raises
            closing.callback(self._leave_textfile, ended=True)
            if self._log is not None:
                closing.callback(self._log.close)
            if self._server is not None:
                closing.callback(stop_serving, self._server)
            if self._target is not None:
                closing.callback(self._target.close)

    def _current(self) -> Snapshot:
        """Returns the newest state; the last one that was seen once the tracer is gone."""
        return self._snapshot() or replace(self._seen, up=False)

    def _leave_textfile(self, *, ended: bool = False) -> None:
        if self._textfile is None:
            return
        self._seen = self._snapshot() or self._seen
        write_textfile(self._textfile, replace(self._seen, ended=ended))

"""What a tracer exports while it is attached: metrics by endpoint and push, step log; and how the run has ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from memtrace.allocator.recording import AllocatorRecording
from memtrace.config import TracerConfig
from memtrace.errors import OutputError, packages_of
from memtrace.exporters.claims import Claim
from memtrace.exporters.endpoint.page import render_page
from memtrace.exporters.endpoint.server import Endpoint, MetricsServer, serve
from memtrace.exporters.prometheus import registry_of
from memtrace.exporters.run_directory.allocator_file import write_recording
from memtrace.exporters.run_directory.run_file import RunFile, run_file_path
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.exporters.run_directory.timeline_file import timeline_text, timelines_path, write_timeline
from memtrace.exporters.targets import TargetFile, clear_stale, target_path
from memtrace.exporters.textfile import clear_ended, textfile_path, write_textfile
from memtrace.oom.files import write_report
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.oom.report import OomReport
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot
from memtrace.sources.termination import TERMINATION

if TYPE_CHECKING:
    from memtrace.exporters.otlp.push import OtlpPush

logger = logging.getLogger("memtrace")


class Exports:
    """The outputs that the settings ask for. Made by `Exports.open()`.

    Their life ends with `close()`, which waits for the server's threads, or with `end()`, which waits for nothing: a
    finalizer may call it, on any thread, also at interpreter exit. They belong to the process that opened them: in a
    forked child nothing is written, removed or closed, whatever is called there.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot | None],
        identity: RunIdentity,
        recording: Callable[[], AllocatorRecording | None] = lambda: None,
    ) -> None:
        self._snapshot, self._recording = snapshot, recording
        self._seen = Snapshot(identity=identity, up=False)
        """The last state for the text file, for when the tracer is gone."""
        self._pid = os.getpid()
        self._ended = False
        self._state = RunState.RUNNING
        self._state_at_exit: RunState | None = None
        """How the run ends where the script leaves before its next step; None where nothing is known of that."""
        self._linger_seconds = 0.0
        self._scrapes_before_end = 0
        self._claim: Claim | None = None
        self._run_file: RunFile | None = None
        self._server: MetricsServer | None = None
        self._push: OtlpPush | None = None
        self._target: TargetFile | None = None
        self._log: StepLog | None = None
        self._timeline_directory: Path | None = None
        self._timelines: StepLog | None = None
        self._highest_peak = 0
        """Of the step whose timeline lies there."""
        self._recording_directory: Path | None = None
        self._recorded: AllocatorRecording | None = None
        """What is in the file."""
        self._textfile: Path | None = None
        self._oom_directory: Path | None = None
        self._oom_reports = 0
        self._on_record: Callable[[StepRecord], None] | None = None

    @classmethod
    def open(
        cls,
        snapshot: Callable[[], Snapshot | None],
        identity: RunIdentity,
        config: TracerConfig,
        log_dir: Path,
        *,
        recording: Callable[[], AllocatorRecording | None] = lambda: None,
        on_record: Callable[[StepRecord], None] | None = None,
    ) -> Self:
        """Opens all outputs, or none.

        Args:
            snapshot: returns the newest state of the tracer; None once the tracer is gone. Called from any thread.
            identity: which process of which run this is.
            config: the settings.
            log_dir: directory of the step log.
            recording: returns what the allocator was asked for in the highest step; None where there is none.
            on_record: is called with each finished step, last of all. Must not keep the tracer alive.

        Raises:
            ConfigError: the password file, the certificate or the key cannot be read.
            MissingPackageError: the metrics are to be pushed, and the SDK of OpenTelemetry is not installed.
            OutputError: the address, every port tried, or the log directory cannot be used.
        """
        exports = cls(snapshot, identity, recording)
        exports._linger_seconds = config.linger_seconds
        exports._on_record = on_record
        with ExitStack() as opening:
            opening.callback(exports.close)
            if config.step_log or config.oom_reports or config.allocator_recording:
                log_dir = exports._claim_directory(log_dir)
            if config.textfile_dir is not None:
                exports._textfile = textfile_path(config.textfile_dir, identity)
                exports._leave_textfile()  # now, so that a directory that cannot be written is told now
                clear_ended(config.textfile_dir, identity.run_name)
            if config.step_log:
                exports._log = StepLog(step_log_path(log_dir, identity.rank), max_bytes=config.log_max_bytes)
                exports._timeline_directory = log_dir
                if config.timelines:
                    place = timelines_path(log_dir, identity.rank)
                    exports._timelines = StepLog(place, max_bytes=config.log_max_bytes, parts=_timeline_line)
            if config.allocator_recording:
                exports._recording_directory = log_dir
            endpoint = Endpoint.of(config, identity.local_rank)
            if endpoint is not None:
                exports._serve(endpoint)
            if config.step_log:
                if exports._server is not None:
                    clear_stale(log_dir)
                    exports._target = TargetFile(
                        target_path(log_dir, identity.rank), exports._server.url, identity.run_id
                    )
                exports._run_file = RunFile(
                    run_file_path(log_dir, identity.rank), identity, exports.url, limit_bytes=config.device_limit_bytes
                )
            if config.otlp_endpoint is not None:
                exports._push = _push_to(exports._current, config.otlp_endpoint)
            if config.oom_reports:
                exports._oom_directory, exports._oom_reports = log_dir, config.oom_reports
            opening.pop_all()
        return exports

    def _claim_directory(self, wanted: Path) -> Path:
        """Returns the directory that this run has for itself: the wanted one, or one below it."""
        self._claim = Claim(wanted, self._seen.identity)
        if self._claim.directory != wanted:
            logger.warning(
                "memtrace: another process writes to %s as rank %d too: this one's files are in %s",
                wanted,
                self._seen.identity.rank,
                self._claim.directory,
            )
        return self._claim.directory

    def _serve(self, endpoint: Endpoint) -> None:
        self._server = serve(registry_of(self._current), endpoint, lambda: render_page(self._current()))
        if endpoint.port and self._server.port != endpoint.port:
            logger.warning(
                "memtrace: port %d is in use: the metrics of rank %d are at port %d",
                endpoint.port,
                self._seen.identity.rank,
                self._server.port,
            )

    @property
    def url(self) -> str | None:
        """Address of the metrics; None where none are served."""
        return None if self._server is None else self._server.url

    @property
    def log_path(self) -> Path | None:
        """File of the step log; None where none is written."""
        return None if self._log is None else self._log.path

    def write(self, record: StepRecord) -> None:
        """Hands a finished step to the log, its curve, if it has one, to the timeline, and then to `on_record`."""
        if not self._is_ours:
            return
        self._state_at_exit = None
        if self._textfile is not None:
            self._seen = self._current()
        if self._log is not None:
            self._log.write(record)
        if self._run_file is not None:
            try:
                self._run_file.step(record)
            except OutputError as error:
                self._run_file = None
                logger.warning("memtrace: %s; from now on there is none", error)
        if record.curve is not None:
            self._write_curve(record)
        if self._on_record is not None:
            self._on_record(record)

    def _write_curve(self, record: StepRecord) -> None:
        if self._timelines is not None:
            self._timelines.write(record)
        peak = record.moments[Moment.PEAK].total_bytes
        if self._timeline_directory is not None and peak > self._highest_peak:
            self._highest_peak = peak
            try:
                write_timeline(self._timeline_directory, record)
            except OutputError as error:
                self._timeline_directory = None
                logger.warning("memtrace: %s; from now on there is none", error)
        if self._recording_directory is not None:
            try:
                self._write_recording(self._recording_directory)
            except OutputError as error:
                self._recording_directory = None
                logger.warning("memtrace: %s; from now on there is none", error)

    def write_oom(self, report: OomReport) -> Path | None:
        """Writes an OOM report and, since nothing may follow it, the text file; returns the report's file.

        None where the settings want no reports, and where it cannot be written: that is logged.
        """
        if not self._is_ours:
            return None
        path = None
        if self._run_file is not None and not report.request.pending:
            self._run_file.count_oom()
        try:
            if self._oom_directory is not None:
                path = write_report(self._oom_directory, report, keep=self._oom_reports)
                if not report.request.pending:
                    self._write_recording(self._oom_directory)
        except OutputError as error:
            logger.warning("memtrace: %s", error)
        try:
            if not report.request.pending:
                self._leave_textfile()
        except OutputError as error:
            logger.warning("memtrace: %s", error)
        return path

    def ends(self, state: RunState) -> None:
        """Leaves signs of how the run ends: at once, since the process may be gone in a moment. The first word counts.

        The endpoint goes on until the outputs are closed, and says it too.
        """
        if self._is_ours and self._state is RunState.RUNNING:
            self._state = state
            self._scrapes_before_end = 0 if self._server is None else self._server.scrapes.begun
            for leave in (self._leave_run_file, self._leave_textfile):
                try:
                    leave()
                except OutputError as error:
                    logger.warning("memtrace: %s", error)

    def may_end(self, state: RunState) -> None:
        """Takes in how the run ends if the script leaves as it says, before its next step."""
        self._state_at_exit = state

    def give_way(self) -> None:
        """Takes in that the training begins anew with outputs of its own: nothing waits for a scrape of these."""
        self._linger_seconds = 0.0
        self.ends(RunState.OK)

    def terminated(self) -> None:
        """Takes in a SIGTERM that ends the process."""
        self.linger(RunState.SIGNAL)
        self.ends(RunState.SIGNAL)
        self._push_the_end()
        self.end()

    def exits(self) -> None:
        """Takes in that the interpreter exits."""
        self.linger(self._state_at_end)
        self._push_the_end()

    def _push_the_end(self) -> None:
        """Waits, for a few seconds at most, until the last figures are pushed, where any are."""
        if self._is_ours and self._push is not None:
            self.ends(self._state_at_end)
            self._push.close()

    def linger(self, state: RunState) -> None:
        """Waits for one more scrape where the settings ask for it, once it is known how the run has ended."""
        if not self._is_ours or self._server is None or not self._linger_seconds:
            return
        seconds, self._linger_seconds = self._linger_seconds, 0.0  # first: who interrupts it does not wait again
        self.ends(state)
        self._server.scrapes.wait_for_one_after(self._scrapes_before_end, seconds)

    def close(self) -> None:
        """Closes the outputs and waits for the server's threads; a second call does nothing."""
        self._state_at_exit = None  # the script has not left
        try:
            with ExitStack() as closing:  # also where Ctrl-C ends the wait
                closing.callback(self._finish, wait=True)
                self.linger(self._state_at_end)
        except OutputError as error:  # the end of a run is no time to fail it
            logger.warning("memtrace: %s", error)

    def end(self) -> None:
        """Does the same without waiting for any thread, and without a word: the log may be what was interrupted."""
        with suppress(OutputError):
            self._finish(wait=False)

    @property
    def ends_well(self) -> bool:
        """Whether the run, if it ends now, has ended well: not by an exception or a signal, and in this process."""
        return self._is_ours and self._state_at_end is RunState.OK

    @property
    def _is_ours(self) -> bool:
        """Whether this process has opened the outputs, and has not closed them."""
        return not self._ended and self._pid == os.getpid()

    def _finish(self, *, wait: bool) -> None:
        if not self._is_ours:
            return
        self._state = self._state_at_end
        self._ended = True
        with ExitStack() as closing:  # from the last one to the first, whatever one of them raises
            if self._claim is not None:
                closing.callback(self._claim.release)
            if self._push is not None:  # after the files: it may wait
                closing.callback(self._push.close if wait else self._push.end)
            closing.callback(self._leave_textfile)
            closing.callback(self._leave_run_file)
            for log in (self._log, self._timelines):
                if log is not None:
                    closing.callback(log.close)
            if self._server is not None:
                closing.callback(self._server.close if wait else self._server.end)
            if self._target is not None:
                closing.callback(self._target.close, self._state)

    @property
    def _state_at_end(self) -> RunState:
        """How the run has ended where it ends now and nobody has said more."""
        if self._state is not RunState.RUNNING:
            return self._state
        return RunState.SIGNAL if TERMINATION.has_come else self._state_at_exit or RunState.OK

    def _current(self) -> Snapshot:
        """Returns the newest state; the last one that was seen once the tracer is gone."""
        return replace(self._snapshot() or replace(self._seen, up=False), state=self._state)

    def _write_recording(self, directory: Path) -> None:
        recording = self._recording()
        if recording is not None and recording is not self._recorded:
            write_recording(directory, recording)
            self._recorded = recording

    def _leave_textfile(self) -> None:
        if self._textfile is None:
            return
        self._seen = self._snapshot() or self._seen
        write_textfile(self._textfile, replace(self._seen, state=self._state))

    def _leave_run_file(self) -> None:
        if self._run_file is not None:
            self._run_file.end(self._state)


def _timeline_line(record: StepRecord) -> list[bytes]:
    assert record.curve is not None
    return [timeline_text(record, record.curve).encode("ascii")]


def _push_to(source: Callable[[], Snapshot], endpoint: str) -> OtlpPush | None:
    with packages_of("otlp_endpoint"):
        from memtrace.exporters.otlp.push import push_to  # noqa: PLC0415 - an extra, and a third of a second
    return push_to(source, endpoint)

"""`memtrace report`: a run as one HTML file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from memtrace.cli.show import find_logs, of_the_newest_run
from memtrace.errors import ConfigError, LogFormatError, OutputError
from memtrace.exporters.run_directory.run_file import name_of
from memtrace.exporters.run_directory.run_history import OomText, RankHistory, RunHistory, observe
from memtrace.exporters.run_directory.steplog import newest_run, read_step_log
from memtrace.exporters.run_directory.timeline_file import read_timeline, timeline_path
from memtrace.record.oom.document import parse_report
from memtrace.record.strict_json import parse_json
from memtrace.record.units import parse_bytes


class Report:
    """Writes what the log directory of a run tells as a page for a browser."""

    name = "report"
    summary = "Write a run as one HTML file: what took the memory, what to do first, ranks, out-of-memory reports."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the directory, the file to write, the limit of the run and its largest batch."""
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory that has the step logs")
        parser.add_argument(
            "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
        )
        parser.add_argument(
            "--limit", metavar="SIZE", help="what the run may use of its device, such as 24GiB; default: all of it"
        )
        parser.add_argument(
            "--max-tokens",
            type=int,
            metavar="N",
            help="tokens of the largest micro batch that the run could meet, padding included; default: of the largest "
            "one seen",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Writes the file and says where.

        Raises:
            ConfigError: the limit is not a size, or the largest batch has no token.
            LogFormatError: a log cannot be read, or none has a step.
            OutputError: the file cannot be written.
        """
        from memtrace.exporters.html import render_html  # noqa: PLC0415 - plotly takes a second to import

        limit = None if arguments.limit is None else parse_bytes(arguments.limit)
        if arguments.max_tokens is not None and arguments.max_tokens < 1:
            raise ConfigError(f"--max-tokens must be at least 1, got {arguments.max_tokens}")
        page = render_html(read_run(arguments.run_dir, limit, arguments.max_tokens))
        try:
            arguments.output.write_text(page, encoding="utf-8", errors="replace")
        except OSError as error:
            raise OutputError(f"{arguments.output} cannot be written: {error.strerror}") from error
        print(arguments.output)
        return 0


def read_run(directory: Path, limit_bytes: int | None, max_tokens: int | None) -> RunHistory:
    """Returns a run as its log directory tells it.

    Raises:
        LogFormatError: there is no log, a log or a timeline cannot be read, or no step has ended yet.
    """
    logs = find_logs(directory)
    ranks = _of_the_newest_launch([history for log in logs if (history := _read_rank(log, limit_bytes, max_tokens))])
    if not ranks:
        raise LogFormatError(f"{directory}: there is no finished step yet")
    home = logs[0].parent
    launches = {history.last.record.run_id for history in ranks}
    reports = [_read_report(path) for path in sorted(home.glob("oom-rank*.md")) if _launch(path) in {None, *launches}]
    named = home if directory.is_dir() else directory
    return RunHistory(name=name_of(named.resolve()), ranks=ranks, oom_reports=reports)


def _of_the_newest_launch(ranks: list[RankHistory]) -> list[RankHistory]:
    """Leaves out ranks that only an earlier launch had, as `memtrace show` does."""
    kept = of_the_newest_run({rank.rank: {step.record.step: step.record for step in rank.steps} for rank in ranks})
    return [rank for rank in ranks if rank.rank in kept]


def _read_rank(log: Path, limit_bytes: int | None, max_tokens: int | None) -> RankHistory | None:
    history = observe(newest_run(read_step_log(log)), limit_bytes=limit_bytes, max_tokens=max_tokens)
    if history is None:
        return None
    return replace(history, timeline=read_timeline(timeline_path(log.parent, history.rank)))


def _launch(path: Path) -> str | None:
    """Returns the launch that a report is of, which the document beside it says; None where it says none."""
    document = path.with_suffix(".json")
    try:
        return parse_report(parse_json(document.read_bytes(), str(document)), str(document)).run_id or None
    except (OSError, LogFormatError):
        return None


def _read_report(path: Path) -> OomText:
    try:
        return OomText(name=path.stem, text=path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise LogFormatError(f"{path}: the report cannot be read: {error.strerror}") from error

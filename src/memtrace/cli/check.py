"""`memtrace check`: plans the cases of a repository again, and says what grew."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from memtrace.errors import ConfigError, OutputError
from memtrace.gate.baseline import Baseline, baseline_text, read_baseline, versions_here, write_baseline
from memtrace.gate.case_file import CaseFile, case_lines, find_case_file, read_case_file
from memtrace.gate.findings import Report, report_of
from memtrace.gate.processes import Outcome, Unplanned, plan_cases
from memtrace.gate.reports.github import github_report
from memtrace.gate.reports.junit import junit_report
from memtrace.gate.reports.markdown import markdown_report
from memtrace.gate.reports.text import text_report
from memtrace.gate.result import CaseResult
from memtrace.record.whole_file import write_whole


class Check:
    """Holds the plans of a repository's cases against its baseline."""

    name = "check"
    summary = "Plan the cases of a repository again, and say which category of which module grew."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the file of cases, which of them, and what is printed."""
        parser.add_argument(
            "--file", type=Path, metavar="FILE", help="file of cases; default memtrace.toml, else pyproject.toml, here"
        )
        parser.add_argument("--baseline", type=Path, metavar="FILE", help="default: the one that the file names")
        parser.add_argument(
            "--case", action="append", metavar="NAME", help="plan this case only, again for each; default all"
        )
        parser.add_argument("--jobs", type=int, metavar="N", help="processes that plan; default one a processor")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--update", action="store_true", help="write what the cases take now as the baseline")
        what.add_argument(
            "--json", action="store_true", help="print what the cases take now, in the form of the baseline"
        )
        what.add_argument(
            "--format",
            action="append",
            metavar="FORM[=FILE]",
            help=f"one of {', '.join(_FORMS)}, printed or written to a file, again for each; default text",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Says what was found; returns 0, 1 where a case grew over its tolerance, 2 where one has no plan or baseline.

        Raises:
            ConfigError: the file of cases is wrong, there is no baseline or no such case or form.
            LogFormatError: the baseline has not its documented form.
            OutputError: a file cannot be written, or nothing was planned.
        """
        forms = [_form(text) for text in arguments.format or ["text"]]
        file = read_case_file(arguments.file or find_case_file(Path.cwd()))
        path = arguments.baseline or file.baseline
        if arguments.update or arguments.json:
            outcomes = plan_cases(file, arguments.case, arguments.jobs)
            made = Baseline(versions=versions_here(), cases=_planned(outcomes))
            complete = len(made.cases) == len(outcomes)
            if arguments.json:
                print(baseline_text(made), end="")
            elif complete:
                _update(path, made, file, whole=arguments.case is None)
            return 0 if complete else 2
        baseline = read_baseline(path)  # before seconds are spent on what it is held against
        outcomes = plan_cases(file, arguments.case, arguments.jobs)
        report = report_of(file.cases, outcomes, baseline, versions_here())
        for form, destination in forms:
            _put(_FORMS[form](report, file), destination)
        return report.exit_status


def _planned(outcomes: Mapping[str, Outcome]) -> dict[str, CaseResult]:
    """Returns the outcomes that are results, and says of the others why they are none."""
    planned = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Unplanned):
            print(f"memtrace: case {name} cannot be planned: {outcome.reason}", file=sys.stderr)
        else:
            planned[name] = outcome
    return planned


def _update(path: Path, made: Baseline, file: CaseFile, *, whole: bool) -> None:
    if not whole and path.exists():
        before = read_baseline(path)
        if before.versions != made.versions:
            raise ConfigError(f"{path} was made with other versions: update all cases at once, without --case")
        kept = {name: result for name, result in before.cases.items() if name in file.cases}
        made = Baseline(versions=made.versions, cases={**kept, **made.cases})
    write_baseline(path, made)
    number = len(made.cases)
    print(f"{path} written: {number} case{'s' * (number != 1)}")


def _form(text: str) -> tuple[str, Path | None]:
    name, equals, path = text.partition("=")
    if name not in _FORMS or (equals and not path):
        raise ConfigError(f"--format must be one of {', '.join(_FORMS)}, or such as junit=report.xml, got {text!r}")
    return name, Path(path) if equals else None


def _put(text: str, destination: Path | None) -> None:
    if destination is None:
        print(text, end="")
        return
    try:
        write_whole(destination, text)
    except OSError as error:
        raise OutputError(f"the report {destination} cannot be written: {error.strerror or error}") from error


def _github(report: Report, file: CaseFile) -> str:
    root = os.environ.get("GITHUB_WORKSPACE") or Path.cwd()
    return github_report(report, os.path.relpath(file.path, root), case_lines(file))


_FORMS: dict[str, Callable[[Report, CaseFile], str]] = {
    "text": lambda report, _: text_report(report),
    "github": _github,
    "markdown": lambda report, _: markdown_report(report),
    "junit": lambda report, _: junit_report(report),
}

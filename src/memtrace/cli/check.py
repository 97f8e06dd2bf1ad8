"""`memtrace check`: plans the cases of a repository again, and says what grew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memtrace.errors import ConfigError
from memtrace.gate.baseline import Baseline, baseline_text, versions_here
from memtrace.gate.case_file import CaseFile, find_case_file, read_case_file
from memtrace.gate.cases import Case
from memtrace.gate.processes import Unplanned, plan_cases
from memtrace.gate.result import CaseResult


class Check:
    """Holds the plans of a repository's cases against its baseline."""

    name = "check"
    summary = "Plan the cases of a repository again, and say which category of which module grew."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the file of cases, which of them, and what is printed."""
        parser.add_argument(
            "--file", type=Path, metavar="FILE", help="file of cases; default memtrace.toml, else pyproject.toml, here"
        )
        parser.add_argument(
            "--case", action="append", metavar="NAME", help="plan this case only, again for each; default all"
        )
        parser.add_argument("--jobs", type=int, metavar="N", help="processes that plan; default one a processor")
        parser.add_argument(
            "--json", action="store_true", help="print what the cases take now, in the form of the baseline"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints what was found; returns 0, 1 where a case grew, 2 where one cannot be planned.

        Raises:
            ConfigError: the file of cases is wrong, or has no such case.
        """
        file = read_case_file(arguments.file or find_case_file(Path.cwd()))
        outcomes = plan_cases(_chosen(file, arguments.case), file.root, file.python_path, arguments.jobs)
        planned = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, CaseResult)}
        for name, outcome in outcomes.items():
            if isinstance(outcome, Unplanned):
                print(f"memtrace: case {name} cannot be planned: {outcome.reason}", file=sys.stderr)
        print(baseline_text(Baseline(versions=versions_here(), cases=planned)), end="")
        return 0 if len(planned) == len(outcomes) else 2


def _chosen(file: CaseFile, names: list[str] | None) -> list[Case]:
    for name in names or ():
        if name not in file.cases:
            raise ConfigError(f"{file.path} has no case {name!r}, only {', '.join(file.cases)}")
    return [file.cases[name] for name in names or file.cases]

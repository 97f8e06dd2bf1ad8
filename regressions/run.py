"""Plans the cases with each release, and writes the results and the page: `make regressions`.

Each release has a directory of its own, some 60 MB, in the cache that `memtrace bisect` uses. What is known stays;
a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from memtrace.errors import PlanError
from memtrace.gate.case_file import CaseFile, read_case_file
from memtrace.gate.cases import Case
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import OUTSIDE
from memtrace.gate.versions.elsewhere import plan_elsewhere
from memtrace.gate.versions.environments import Environments, cache_directory
from memtrace.gate.versions.releases import Index
from memtrace.record.categories import Moment
from regressions import page, results
from regressions.results import Outcomes, Peak

RELEASES = ("4.50.3", "4.53.3", "4.55.4", "4.57.6", "5.0.0", "5.16.1", "5.20.2", "5.24.0")
"""What is planned where nobody says which: the ends of the two series, and neighbours of what changed between."""

AT_ONCE = 5
"""Cases that are planned between two writes."""


def main() -> None:
    """Plans what is not known."""
    parser = argparse.ArgumentParser(prog="python -m regressions.run", description=__doc__)
    parser.add_argument("releases", nargs="*", help="releases of transformers; the usual ones without")
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="where releases are kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes that plan")
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--page-only", action="store_true", help="write the page, plan nothing")
    arguments = parser.parse_args()
    environments = Environments(directory=arguments.cache.absolute() / "environments", index=Index())
    for release in () if arguments.page_only else arguments.releases or RELEASES:
        _measure(release, environments, arguments.jobs, again=arguments.again)
    page.write()


def _measure(release: str, environments: Environments, jobs: int, *, again: bool) -> None:
    file = read_case_file(results.CASES)
    wanted = [case for name, case in file.cases.items() if again or release not in results.read(name).found]
    for begin in range(0, len(wanted), AT_ONCE):
        some = wanted[begin : begin + AT_ONCE]
        print(f"transformers {release}: {len(wanted) - begin} cases", file=sys.stderr, flush=True)
        _note(release, _plan(some, file, environments.path_of("transformers", release), jobs))


def _plan(cases: Sequence[Case], file: CaseFile, first: Path, jobs: int) -> Mapping[str, Outcome]:
    try:
        return plan_elsewhere(cases, file.root, file.python_path, [first], jobs=jobs)
    except PlanError as error:
        return {case.name: Unplanned(reason=str(error)) for case in cases}


def _note(release: str, outcomes: Mapping[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if isinstance(outcome, Unplanned):
            found: Peak | str = outcome.reason.replace(f"{results.HERE}/", "")
        else:
            at_peak = outcome.modules[Moment.PEAK]
            found = {entry: {name or OUTSIDE: size for name, size in of.items()} for entry, of in at_peak.items()}
        results.write(name, Outcomes({**results.read(name).found, release: found}))


if __name__ == "__main__":
    main()

"""What the forms of a report share: sentences about versions, totals and modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter

from memtrace.gate.cases import Tolerance
from memtrace.gate.findings import MOMENTS, Change, Finding, Report, State, Total
from memtrace.record.units import format_bytes

SHOWN = 12
"""Changes that are listed for each case."""

UPDATE = "memtrace check --update"


def version_lines(report: Report) -> Iterator[str]:
    """Yields a sentence for each package whose version is not the baseline's."""
    for package, before, now in report.versions:
        yield f"the baseline was made with {package} {before}, this check with {package} {now}"


def gone_lines(report: Report) -> Iterator[str]:
    """Yields a sentence for each case of the baseline that is a case no longer."""
    for name in report.gone:
        yield f"{name} is in the baseline and is no case any more: {UPDATE} drops it"


def headline(finding: Finding) -> str:
    """Returns what became of a case, in one line."""
    match finding.state:
        case State.UNPLANNED:
            return f"{finding.case} cannot be planned: {finding.reason}"
        case State.NEW:
            return f"{finding.case} is not in the baseline: {UPDATE} adds it"
        case State.UNCHANGED:
            return f"{finding.case} is unchanged: {format_bytes(finding.totals[0].now)} at the peak"
        case State.GREW:
            grown = [total for total in finding.totals if total.is_over]
            return f"{finding.case} grew: {total_words(grown[0])}, {allowed(finding.tolerance)}"
        case State.SHRANK:
            less = [total for total in finding.totals if total.growth]
            return f"{finding.case} shrank: {total_words(less[0])}; {UPDATE} keeps it so"
        case State.CHANGED:
            differing = [total for total in finding.totals if total.growth]
            said = total_words(differing[0]) if differing else "the same totals, of other parts"
            return f"{finding.case} changed within its tolerance: {said}"


def total_words(total: Total) -> str:
    """Returns a total and its growth, such as `peak 1.25 GiB, +256.00 MiB (+25.0 %)`."""
    share = f" ({total.growth / total.before:+.1%})".replace("%", " %") if total.before and total.growth else ""
    growth = f", {signed(total.growth)}{share}" if total.growth else ", as before"
    return f"{total.name} {format_bytes(total.now)}{growth}"


def change_words(change: Change) -> str:
    """Returns what grew or shrank, such as `activations float32 of lm_head: +128.00 MiB, 128.00 MiB before`."""
    return f"{change.entry} {of(change)}: {signed(change.growth)}, {format_bytes(change.before)} before"


def of(change: Change) -> str:
    """Returns whose bytes a change is of."""
    return f"of {change.module}" if change.module else "outside of the model"


def rest_words(finding: Finding) -> str:
    """Returns how many changes are not listed; empty where all are."""
    rest = len(finding.changes) - SHOWN
    return f"and {rest} more, the smallest of them" if rest > 0 else ""


def shown_changes(finding: Finding) -> Iterator[tuple[str, list[Change]]]:
    """Yields the name of each moment that shows some of the largest changes, and these, growth first."""
    largest = sorted(finding.changes, key=lambda change: -abs(change.growth))[:SHOWN]
    shown = [change for change in finding.changes if change in largest]
    for moment, changes in groupby(shown, key=attrgetter("moment")):
        yield MOMENTS[moment], list(changes)


def allowed(tolerance: Tolerance) -> str:
    """Returns what a total may grow by."""
    if tolerance.share:
        return f"{tolerance.share * 100:g} % allowed"
    return f"{format_bytes(tolerance.nbytes)} allowed" if tolerance.nbytes else "nothing allowed"


def signed(nbytes: int) -> str:
    """Returns a difference with its sign."""
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)


def summary(report: Report) -> str:
    """Returns how many cases there are, and what became of them."""
    counted = Counter(finding.state for finding in report.findings)
    parts = ", ".join(f"{counted[state]} {state}" for state in State if counted[state])
    number = len(report.findings)
    return f"{number} case{'s' * (number != 1)}: {parts}" if number else "no cases"

"""What a check finds: totals of each case held against the baseline, and whose bytes a difference is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from memtrace.gate.baseline import Baseline
from memtrace.gate.cases import Case, Tolerance
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import CaseResult
from memtrace.record.categories import Moment

MOMENTS = {
    Moment.PEAK: "peak",
    Moment.FORWARD_END: "end of the forward pass",
    Moment.BACKWARD_END: "end of the backward pass",
    Moment.STEP_END: "end of the step",
}
"""The moments that are held against the baseline, in this order, with their names for people."""

RESERVED, HOST = "reserved by the allocator", "host memory"


class State(StrEnum):
    """What became of a case."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    """Within the tolerance, or the same totals of other parts."""
    SHRANK = "shrank"
    """Less of some totals, more of none."""
    GREW = "grew"
    NEW = "not in the baseline"
    UNPLANNED = "cannot be planned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """One number that a case may not grow in."""

    name: str
    before: int
    now: int
    is_over: bool
    """Whether it grew by more than the tolerance."""

    @property
    def growth(self) -> int:
        """Bytes more than before; negative where it is less."""
        return self.now - self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One entry of one kind of module that is not what it was."""

    moment: Moment
    """The first one that shows it; moments whose totals grew come first."""
    entry: str
    """Category, component and type, such as `activations float32`."""
    module: str
    """Empty for what no module has."""
    before: int
    now: int

    @property
    def growth(self) -> int:
        """Bytes more than before; negative where it is less."""
        return self.now - self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one case."""

    case: str
    state: State
    tolerance: Tolerance
    reason: str = ""
    """Why it cannot be planned."""
    totals: Sequence[Total] = ()
    """The peak first; none where there is nothing to hold against each other."""
    changes: Sequence[Change] = ()
    """By moment, the largest growth first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a check found."""

    versions: Sequence[tuple[str, str, str]]
    """Package, version in the baseline and version here, where they differ; `none` where it is not there."""
    findings: Sequence[Finding]
    gone: Sequence[str] = ()
    """Cases of the baseline that the file no longer has."""

    @property
    def exit_status(self) -> int:
        """0, 1 where a case grew over its tolerance, 2 where one has no plan or no baseline."""
        states = {finding.state for finding in self.findings}
        if states & {State.UNPLANNED, State.NEW}:
            return 2
        return 1 if State.GREW in states else 0


def report_of(
    cases: Mapping[str, Case], outcomes: Mapping[str, Outcome], baseline: Baseline, versions: Mapping[str, str]
) -> Report:
    """Returns what the outcomes of some or all cases are, held against a baseline.

    Args:
        cases: all cases of the file.
        outcomes: of those that were planned now.
        baseline: what they took before.
        versions: of packages, here.
    """
    packages = sorted({*baseline.versions, *versions})
    both = [(name, baseline.versions.get(name, "none"), versions.get(name, "none")) for name in packages]
    return Report(
        versions=[row for row in both if row[1] != row[2]],
        findings=[
            _finding(cases[name], outcome, baseline.cases.get(name)) for name, outcome in sorted(outcomes.items())
        ],
        gone=sorted(set(baseline.cases) - set(cases)),
    )


def peak_changes(before: CaseResult, now: CaseResult) -> list[Change]:
    """Returns what differs at the peak, the largest difference first, whether more or less."""
    return sorted(
        _changes(before, now, [Moment.PEAK]), key=lambda change: (-abs(change.growth), change.entry, change.module)
    )


def _finding(case: Case, outcome: Outcome, before: CaseResult | None) -> Finding:
    if isinstance(outcome, Unplanned):
        return Finding(case=case.name, state=State.UNPLANNED, tolerance=case.tolerance, reason=outcome.reason)
    if before is None:
        return Finding(case=case.name, state=State.NEW, tolerance=case.tolerance)
    totals = [
        Total(name=name, before=was, now=now, is_over=not case.tolerance.allows(was, now))
        for name, was, now in _totals(before, outcome)
    ]
    changes = list(_changes(before, outcome, _most_grown_first(totals)))
    return Finding(
        case=case.name, state=_state(totals, changes), tolerance=case.tolerance, totals=totals, changes=changes
    )


def _state(totals: Sequence[Total], changes: Sequence[Change]) -> State:
    if any(total.is_over for total in totals):
        return State.GREW
    growths = [total.growth for total in totals]
    if any(growths) and max(growths) <= 0:
        return State.SHRANK
    return State.CHANGED if changes or any(growths) else State.UNCHANGED


def _most_grown_first(totals: Sequence[Total]) -> list[Moment]:
    """Returns the moments: those over the tolerance, those that differ, the others, each in the order of `MOMENTS`."""
    by_name = {total.name: (not total.is_over, not total.growth) for total in totals}
    return sorted(MOMENTS, key=lambda moment: by_name.get(MOMENTS[moment], (True, True)))


def _totals(before: CaseResult, now: CaseResult) -> Iterator[tuple[str, int, int]]:
    for moment, name in MOMENTS.items():
        if moment in before.modules or moment in now.modules:
            yield name, before.total(moment), now.total(moment)
    if before.reserved_bytes is not None or now.reserved_bytes is not None:
        yield RESERVED, before.reserved_bytes or 0, now.reserved_bytes or 0
    if before.host_bytes or now.host_bytes:
        yield HOST, before.host_bytes, now.host_bytes


def _changes(before: CaseResult, now: CaseResult, moments: Sequence[Moment]) -> Iterator[Change]:
    """Yields what differs, each difference of an entry of a module once; of a moment, the largest growth first."""
    seen: set[tuple[str, str, int]] = set()
    for moment in moments:
        was, held = _by_part(before, moment), _by_part(now, moment)
        parts = {part: held.get(part, 0) - was.get(part, 0) for part in sorted({*was, *held})}
        for (entry, module), growth in sorted(parts.items(), key=lambda item: -item[1]):
            if growth and (entry, module, growth) not in seen:
                seen.add((entry, module, growth))
                old, new = was.get((entry, module), 0), held.get((entry, module), 0)
                yield Change(moment=moment, entry=entry, module=module, before=old, now=new)


def _by_part(result: CaseResult, moment: Moment) -> dict[tuple[str, str], int]:
    held = result.modules.get(moment, {})
    return {(entry, module): size for entry, sizes in held.items() for module, size in sizes.items()}

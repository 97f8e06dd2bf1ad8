"""Which version of a package, or which commit, changed the peak of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from memtrace.errors import PlanError
from memtrace.gate.cases import Case
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import CaseResult
from memtrace.gate.versions.bisection import Jump, find_jump
from memtrace.gate.versions.commits import checked_out
from memtrace.gate.versions.elsewhere import PATHS, has_ended, plan_elsewhere
from memtrace.gate.versions.environments import Environments, fingerprint, installed
from memtrace.gate.versions.kept import KeptOutcomes, state_of, state_of_memtrace


class Versions(Protocol):
    """What a case is planned with, one version at a time."""

    def key(self, case: Case, version: str) -> str:
        """Returns a name for all that the outcome depends on beside the fields of the case and memtrace itself."""

    def plan(self, case: Case, version: str) -> Outcome:
        """Plans the case with a version.

        Raises:
            PlanError: the version cannot be installed, or its process ended.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """Releases of a package."""

    package: str
    environments: Environments
    root: Path
    """The directory in which the paths of the case begin."""
    python_path: tuple[Path, ...]

    def key(self, case: Case, version: str) -> str:
        """Returns a name that changes with what is installed, and with the files that the case names."""
        beside = [*self.environments.beside, *self.environments.index.options]
        files = [self.root / name for name in (getattr(case, key) for key in PATHS) if name]
        code = [] if case.build is None else [self.root, *self.python_path]
        return fingerprint(self.package, version, *beside, *installed(), state_of([*files, *code]))

    def plan(self, case: Case, version: str) -> Outcome:
        """Installs the release where it is not there, and plans the case with it."""
        first = [self.environments.path_of(self.package, version)]
        return plan_elsewhere([case], self.root, self.python_path, first)[case.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commits:
    """Commits of a repository."""

    repository: Path
    """Its top directory."""
    inside: Path
    """Where the paths of the case begin, seen from there."""
    python_path: tuple[Path, ...]
    """Seen from there, too."""

    def key(self, case: Case, version: str) -> str:
        """Returns a name that changes with what is installed; a commit's name stands for its files."""
        return fingerprint("commit", version, str(self.inside), *map(str, self.python_path), *installed())

    def plan(self, case: Case, version: str) -> Outcome:
        """Writes the files of the commit into a directory of their own, and plans the case there."""
        with checked_out(self.repository, version) as files:
            root = files / self.inside
            if not root.is_dir():
                raise PlanError(f"the commit has no directory {self.inside}")
            path = [files / part for part in self.python_path]
            first = [each for each in (files / "src", *path) if each.is_dir()]
            return plan_elsewhere([case], root, path, first, directory=root)[case.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found."""

    jump: Jump | None
    """None where the peak is the same at both ends."""
    tried: dict[str, Outcome]
    """By version, in the order in which they were tried."""

    def result(self, version: str) -> CaseResult:
        """Returns what the case takes with a version that was planned."""
        outcome = self.tried[version]
        assert isinstance(outcome, CaseResult)
        return outcome


@dataclass(slots=True, kw_only=True)
class Search:
    """Plans a case with versions, and keeps what came of it."""

    case: Case
    versions: Versions
    kept: KeptOutcomes
    say: Callable[[str, Outcome, bool], None]
    """Called after each version with its outcome, and whether it was kept from before."""
    tried: dict[str, Outcome] = field(default_factory=dict)

    def run(self, ordered: Sequence[str]) -> Found:
        """Returns the version between the first and the last that changed the peak.

        Raises:
            PlanError: the first or the last version cannot be planned.
        """
        for end in (ordered[0], ordered[-1]):
            outcome = self._outcome(end)
            if isinstance(outcome, Unplanned):
                raise PlanError(f"{end} cannot be planned, so there is nothing to compare with: {outcome.reason}")
        return Found(jump=find_jump(ordered, self._peak), tried=self.tried)

    def _peak(self, version: str) -> int | None:
        outcome = self._outcome(version)
        return outcome.peak_bytes if isinstance(outcome, CaseResult) else None

    def _outcome(self, version: str) -> Outcome:
        if version not in self.tried:
            name = fingerprint(repr(self.case), state_of_memtrace(), self.versions.key(self.case, version))
            outcome = self.kept.find(name)
            was_kept = outcome is not None
            if outcome is None:
                try:
                    outcome = self.versions.plan(self.case, version)
                except PlanError as error:  # it may go well another time, so that it is not kept
                    outcome = Unplanned(reason=str(error))
                else:
                    if not has_ended(outcome):
                        self.kept.keep(name, outcome)
            self.tried[version] = outcome
            self.say(version, outcome, was_kept)
        return self.tried[version]

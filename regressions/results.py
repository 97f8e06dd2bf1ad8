"""What each release made of each case, as it is kept beside the page: one file a case, equal neighbours as one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = HERE / "memtrace.toml"
RESULTS = HERE / "results"

Peak = Mapping[str, Mapping[str, int]]
"""Bytes at the peak by entry, such as `activations float32`, and by kind of module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Neighbouring releases with the same outcome."""

    releases: tuple[str, ...]
    peak: Peak | None
    """None where the case cannot be planned."""
    reason: str = ""
    """Why it cannot be planned."""

    @property
    def nbytes(self) -> int:
        """The peak; 0 where there is none."""
        return sum(sum(sizes.values()) for sizes in (self.peak or {}).values())

    def entry(self, name: str) -> int:
        """Returns the bytes of an entry."""
        return sum((self.peak or {}).get(name, {}).values())


@dataclass(slots=True)
class Outcomes:
    """The outcomes of one case, by release."""

    found: dict[str, Peak | str] = field(default_factory=dict)
    """What is at the peak, or the reason why there is no plan."""

    def levels(self) -> list[Level]:
        """Returns the outcomes in the order of the releases, equal neighbours as one."""
        levels: list[Level] = []
        for release in sorted(self.found, key=number):
            outcome = self.found[release]
            peak, reason = (None, outcome) if isinstance(outcome, str) else (outcome, "")
            if levels and (levels[-1].peak, levels[-1].reason) == (peak, reason):
                release_too = (*levels.pop().releases, release)
            else:
                release_too = (release,)
            levels.append(Level(releases=release_too, peak=peak, reason=reason))
        return levels


def number(release: str) -> tuple[int, ...]:
    """Returns a release as numbers, so that 5.10.0 comes after 5.9.0."""
    return tuple(int(part) for part in release.split("."))


def read(case: str) -> Outcomes:
    """Returns what is known of a case."""
    path = RESULTS / f"{case}.json"
    documents = json.loads(path.read_text()) if path.exists() else []
    return Outcomes({release: one.get("reason") or one["peak"] for one in documents for release in one["releases"]})


def write(case: str, outcomes: Outcomes) -> None:
    """Writes what is known of a case, sorted, a line for each number."""
    RESULTS.mkdir(exist_ok=True)
    documents = [_document(level) for level in outcomes.levels()]
    (RESULTS / f"{case}.json").write_text(json.dumps(documents, indent=1, sort_keys=True) + "\n")


def jumps(case: str) -> Iterator[tuple[Level, Level]]:
    """Yields each two neighbouring levels that were both planned."""
    levels = read(case).levels()
    for before, after in pairwise(levels):
        if before.peak is not None and after.peak is not None:
            yield before, after


def _document(level: Level) -> dict[str, Any]:
    return {"releases": [*level.releases], **({"reason": level.reason} if level.reason else {"peak": level.peak})}

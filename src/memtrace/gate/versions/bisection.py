"""The search for the version, among many in their order, that changed a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Two versions with other peaks; what lies between them was not tried."""

    first: str
    last: str
    nbytes: int
    """Peak of the last one minus that of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """The change that was found."""

    before: str
    """The last version with the peak of before."""
    after: str
    """The first one that could be planned with another peak."""
    nbytes: int
    """Peak after minus peak before."""
    skipped: tuple[str, ...]
    """Versions between the two that cannot be planned: each of them may be the one that made the change."""
    elsewhere: tuple[Stretch, ...]
    """Where the peak changes, too; in the order of the versions. Empty where this is the only jump that was seen."""


def find_jump(versions: Sequence[str], peak_of: Callable[[str], int | None]) -> Jump | None:
    """Returns a jump of the peak between the first and the last version; None where their peaks are equal.

    Each trial halves what lies between. Where the peak differs from both ends, the search goes on where it differs
    more, so that a small change does not hide a large one; the other half is named in `elsewhere`. Of n versions it
    tries about log2(n).

    Args:
        versions: in their order; the first and the last can be planned.
        peak_of: the peak in bytes; None for a version that cannot be planned, in whose place the nearest one to the
            middle is tried. Called once for each version.

    Raises:
        ValueError: there are no two versions, or one at the end has no peak.
    """
    if len(versions) < 2:
        raise ValueError(f"a search needs two versions, got {len(versions)}")
    low, high = 0, len(versions) - 1
    lowest, highest = peak_of(versions[low]), peak_of(versions[high])
    if lowest is None or highest is None:
        raise ValueError(f"both ends need a peak, {versions[low if lowest is None else high]} has none")
    if lowest == highest:
        return None
    skipped: set[int] = set()
    elsewhere: list[tuple[int, Stretch]] = []
    while between := [index for index in range(low + 1, high) if index not in skipped]:
        middle = (low + high) / 2
        index = min(between, key=lambda one: (abs(one - middle), one))
        peak = peak_of(versions[index])
        if peak is None:
            skipped.add(index)
        elif abs(peak - lowest) >= abs(highest - peak):
            _note(elsewhere, versions, index, high, highest - peak)
            high, highest = index, peak
        else:
            _note(elsewhere, versions, low, index, peak - lowest)
            low, lowest = index, peak
    return Jump(
        before=versions[low],
        after=versions[high],
        nbytes=highest - lowest,
        skipped=tuple(versions[index] for index in range(low + 1, high)),
        elsewhere=tuple(stretch for _, stretch in sorted(elsewhere, key=lambda one: one[0])),
    )


def most_trials(count: int) -> int:
    """Returns how many of that many versions `find_jump` tries at most, where none is skipped."""
    return 2 + (count - 2).bit_length()


def _note(noted: list[tuple[int, Stretch]], versions: Sequence[str], first: int, last: int, nbytes: int) -> None:
    if nbytes:
        noted.append((first, Stretch(first=versions[first], last=versions[last], nbytes=nbytes)))

"""The page of regressions, against the results that are kept beside its builder."""

from __future__ import annotations

from fnmatch import fnmatchcase

from memtrace.gate.case_file import read_case_file
from regressions import page, results
from regressions.notes import NOTES

EXPLAINED = 0.01
"""Share of the peak from which on the page says what a jump is."""


def test_the_page_is_what_the_results_make() -> None:
    """As `python -m regressions.run --page-only` writes it."""
    assert page.PAGE.read_text() == page.text()


def test_every_case_has_results_of_the_same_releases() -> None:
    """At least eight, from 4.50 to 5.24; and each peak is the sum of its parts."""
    cases = read_case_file(results.CASES).cases
    assert {path.stem for path in results.RESULTS.glob("*.json")} == {*cases}
    assert len(cases) == 20
    releases = {name: {*results.read(name).found} for name in cases}
    (common,) = {frozenset(found) for found in releases.values()}
    assert len(common) >= 8
    assert {min(common, key=results.number)[:4], max(common, key=results.number)[:4]} == {"4.50", "5.24"}


def test_the_page_says_what_the_large_jumps_are() -> None:
    """And every note is of a jump, or of cases that cannot be planned, by the results."""
    large = [(case, after.releases[0], before, after) for case, before, after in page.large_jumps()]
    shares = {(case, release): after.nbytes / before.nbytes - 1 for case, release, before, after in large}
    assert [jump for jump, share in shares.items() if abs(share) >= EXPLAINED and page.note_of(*jump) is None] == []
    for note in NOTES:
        for row, cases in note.jumps:
            assert any(release == row and fnmatchcase(case, cases) for case, release in shares), (
                note.title,
                row,
                cases,
            )


def test_results_survive_being_written(tmp_path, monkeypatch) -> None:
    """In the order of the releases, equal neighbours as one; a refusal keeps its reason."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    peak = {"weights trainable float32": {"lm_head": 8}}
    outcomes = results.Outcomes({"5.10.0": peak, "5.9.0": "no such model", "5.11.0": peak})
    results.write("case", outcomes)
    assert results.read("case") == outcomes
    assert [level.releases for level in outcomes.levels()] == [("5.9.0",), ("5.10.0", "5.11.0")]
    assert [*results.jumps("case")] == []

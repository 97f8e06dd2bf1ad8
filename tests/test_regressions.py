"""The page of regressions, against the results that are kept beside its builder."""

from __future__ import annotations

from memtrace.gate.case_file import read_case_file
from regressions import page, results
from regressions.notes import NOTES

EXPLAINED = 0.02
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
    large = [(case, after.releases[0], (after.nbytes - before.nbytes) / before.nbytes)
             for case, before, after in page.large_jumps()]  # fmt: skip
    assert [
        (case, release) for case, release, share in large if abs(share) >= EXPLAINED and not page.note_of(case, release)
    ] == []
    noted = {id(page.note_of(case, release)) for case, release, _ in large}
    assert [note.title for note in NOTES if note.release and id(note) not in noted] == []


def test_results_survive_being_written(tmp_path, monkeypatch) -> None:
    """In the order of the releases, equal neighbours as one; a refusal keeps its reason."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    peak = {"weights trainable float32": {"lm_head": 8}}
    outcomes = results.Outcomes({"5.10.0": peak, "5.9.0": "no such model", "5.11.0": peak})
    results.write("case", outcomes)
    assert results.read("case") == outcomes
    assert [level.releases for level in outcomes.levels()] == [("5.9.0",), ("5.10.0", "5.11.0")]
    assert [*results.jumps("case")] == []

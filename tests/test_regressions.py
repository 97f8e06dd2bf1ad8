"""The page of regressions, against the results that are kept beside its builder."""

from __future__ import annotations

from memtrace.gate.case_file import read_case_file
from regressions import page, results
from regressions.notes import NOTES

MANY = 8

EXPLAINED = 0.01
"""Share of the peak from which on the page says what a jump is."""


def test_the_page_is_what_the_results_make() -> None:
    """As `python -m regressions.run --page-only` writes it."""
    assert page.PAGE.read_text() == page.text()


def test_every_case_has_results_of_the_same_releases() -> None:
    """From 4.50 to 5.24; and each peak is the sum of its parts."""
    cases = read_case_file(results.CASES).cases
    assert {path.stem for path in results.RESULTS.glob("*.json")} == {*cases}
    assert len(cases) == 20
    releases = {name: {*results.read(name).found} for name in cases}
    (common,) = {frozenset(found) for found in releases.values()}
    assert len(common) >= MANY
    assert {min(common, key=results.number)[:4], max(common, key=results.number)[:4]} == {"4.50", "5.24"}


def test_the_page_says_what_the_large_jumps_are() -> None:
    """And every note is of a jump, or of cases that cannot be planned, by the results."""
    found = {(case, after.releases[0]): (before, after) for case, before, after in page.large_jumps()}
    notes = {jump: page.notes_of(jump[0], *levels) for jump, levels in found.items()}
    large = [jump for jump, (before, after) in found.items() if abs(after.nbytes / before.nbytes - 1) >= EXPLAINED]
    assert [jump for jump in large if not notes[jump]] == []
    used = [note for some in notes.values() for note in some]
    assert [note.title for note in NOTES if note.jumps and note not in used] == []


def test_results_survive_being_written(tmp_path, monkeypatch) -> None:
    """In the order of the releases, equal neighbours as one; a refusal keeps its reason."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    peak = {"weights trainable float32": {"lm_head": 8}}
    outcomes = results.Outcomes({"5.10.0": peak, "5.9.0": "no such model", "5.11.0": peak})
    results.write("case", outcomes)
    assert results.read("case") == outcomes
    assert [level.releases for level in outcomes.levels()] == [("5.9.0",), ("5.10.0", "5.11.0")]
    assert [*results.jumps("case")] == []

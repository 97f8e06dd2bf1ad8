"""Where reports are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from records import traced_step
from test_oom_document import FULL

from memtrace.cli.report import read_run
from memtrace.errors import OutputError
from memtrace.exporters.html import render_html
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.oom.files import write_report
from memtrace.record.oom.document import parse_report
from memtrace.record.strict_json import parse_json


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rank_and_time_are_in_the_name(tmp_path: Path) -> None:
    """Markdown and JSON share a name with rank and time, in a directory that is made where it is missing."""
    path = write_report(tmp_path / "run", replace(FULL, rank=3, unix_seconds=1700000000.123), keep=5)
    assert path == tmp_path / "run" / "oom-rank3-20231114T221320.123Z.md"
    assert names(tmp_path / "run") == ["oom-rank3-20231114T221320.123Z.json", "oom-rank3-20231114T221320.123Z.md"]
    report = parse_report(parse_json(path.with_suffix(".json").read_text(), "it"), "it")
    assert report.rank == 3


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """The oldest reports of the rank are deleted; other ranks' and other files stay."""
    (tmp_path / "oom-rank1-notes.txt").touch()
    write_report(tmp_path, replace(FULL, rank=11, unix_seconds=1.0), keep=2)
    for second in range(10, 15):
        write_report(tmp_path, replace(FULL, rank=1, unix_seconds=float(second)), keep=2)
    assert names(tmp_path) == [
        "oom-rank1-19700101T000013.000Z.json",
        "oom-rank1-19700101T000013.000Z.md",
        "oom-rank1-19700101T000014.000Z.json",
        "oom-rank1-19700101T000014.000Z.md",
        "oom-rank1-notes.txt",
        "oom-rank11-19700101T000001.000Z.json",
        "oom-rank11-19700101T000001.000Z.md",
    ]


def test_report_of_the_same_time_is_replaced(tmp_path: Path) -> None:
    """What an exception adds to a report goes into the same files."""
    write_report(tmp_path, FULL, keep=5)
    path = write_report(tmp_path, replace(FULL, request=replace(FULL.request, message="told later")), keep=5)
    assert len(names(tmp_path)) == 2
    assert "told later" in path.read_text()


def test_pending_reports_take_no_room(tmp_path: Path) -> None:
    """Of reports that no exception has followed there is one, however many failures torch catches; others stay."""
    write_report(tmp_path, replace(FULL, unix_seconds=1.0), keep=2)
    pending = replace(FULL, request=replace(FULL.request, pending=True))
    for second in range(10, 15):
        write_report(tmp_path, replace(pending, unix_seconds=float(second)), keep=2)
    assert names(tmp_path) == [
        "oom-rank0-19700101T000001.000Z.json",
        "oom-rank0-19700101T000001.000Z.md",
        "oom-rank0-19700101T000014.000Z-pending.json",
        "oom-rank0-19700101T000014.000Z-pending.md",
    ]


def test_completed_report_replaces_the_pending_one_of_its_time(tmp_path: Path) -> None:
    """The exception that follows takes the mark away."""
    write_report(tmp_path, replace(FULL, request=replace(FULL.request, pending=True)), keep=5)
    path = write_report(tmp_path, FULL, keep=5)
    assert names(tmp_path) == [path.with_suffix(".json").name, path.name]


def test_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """The message names the file and the reason, and no draft is left."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(tmp_path / "file", FULL, keep=5)
    assert names(tmp_path) == ["file"]


def test_reports_of_the_run_before_are_not_those_of_this_one(tmp_path: Path) -> None:
    """The page of a rerun has the OOM reports of its own launch; where no document tells, the report is shown."""
    with StepLog(step_log_path(tmp_path, 0)) as log:
        log.write(traced_step(step=1, run_id="b"))
    for at, launch in enumerate(("a", "b")):
        write_report(tmp_path, replace(FULL, rank=0, run_id=launch, unix_seconds=1000.0 + at), keep=5)
    (tmp_path / "oom-rank0-foreign.md").write_text("by hand")
    texts = [report.text for report in read_run(tmp_path, None, None).oom_reports]
    assert len(texts) == 2
    assert "| launch | b |" in texts[0]
    assert texts[1] == "by hand"
    assert "launch b" in render_html(read_run(tmp_path, None, None))

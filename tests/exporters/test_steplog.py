"""The step log: appended line by line, bounded, and readable whatever happened to its writer."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from records import counted_step, traced_step

from memtrace.errors import LogFormatError, OutputError
from memtrace.exporters.run_directory.json_lines import rotated_path
from memtrace.exporters.run_directory.steplog import StepLog, read_step_log, step_log_path
from memtrace.record.units import KIB

WRITER = """
    import sys
    from dataclasses import replace
    from records import traced_step
    from memtrace.exporters.run_directory.steplog import StepLog
"""


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a program that has `StepLog`, in a process of its own."""
    program = textwrap.dedent(WRITER) + textwrap.dedent(script)
    tests = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=tests,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_in(path: Path) -> list[int]:
    return [record.step for record in read_step_log(path)]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    """What was written is read back, from a directory that the log has made itself."""
    path = step_log_path(tmp_path / "run" / "memtrace", 3)
    records = [counted_step(step=1), traced_step(step=2), counted_step(step=3)]
    with StepLog(path) as log:
        for record in records:
            log.write(record)
    assert path.name == "steps-rank3.jsonl"
    assert list(read_step_log(path)) == records
    assert path.read_bytes().count(b"\n") == 3


def test_a_line_is_there_once_write_returns(tmp_path: Path) -> None:
    """Nothing waits in a buffer of this process."""
    with StepLog(tmp_path / "log") as log:
        log.write(traced_step())
        assert steps_in(tmp_path / "log") == [12]


def test_an_existing_log_is_continued(tmp_path: Path) -> None:
    """A resumed run appends to the log of the run before."""
    for step in (1, 2):
        with StepLog(tmp_path / "log") as log:
            log.write(counted_step(step=step))
    assert steps_in(tmp_path / "log") == [1, 2]


def test_sigkill_loses_at_most_the_line_in_flight(tmp_path: Path) -> None:
    """A writer that is killed in full flow leaves all its steps but perhaps the last, and its log can be continued."""
    path = tmp_path / "log"
    script = """
        log = StepLog(sys.argv[1])
        for step in range(1, 1_000_000):
            log.write(replace(traced_step(), step=step))
            if step == 50:
                print("going", flush=True)
    """
    with run(script, path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "going\n"
        writer.send_signal(signal.SIGKILL)
    found = steps_in(path)
    assert len(found) >= 50
    assert found == list(range(1, len(found) + 1))
    with StepLog(path) as log:
        log.write(traced_step(step=7))
    assert steps_in(path) == [*found, 7]


def test_a_torn_end_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that is being written, or was when its writer died, is not an error and not worth a word."""
    path = tmp_path / "log"
    with StepLog(path) as log:
        log.write(traced_step(step=1))
        log.write(traced_step(step=2))
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        assert steps_in(path) == [1]
    assert caplog.records == []


def test_a_torn_end_is_healed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next writer begins on a line of its own; the torn line is left out and counted."""
    path = tmp_path / "log"
    with StepLog(path) as log:
        log.write(traced_step(step=1))
    with path.open("ab") as file:
        file.write(b'{"schema":"memtrace.st')
    with StepLog(path) as log:
        log.write(traced_step(step=2))
    with caplog.at_level(logging.WARNING):
        assert steps_in(path) == [1, 2]
    assert [record.message for record in caplog.records] == [
        f"memtrace: {path}: left out unfinished lines, 1 in all, first line 2"
    ]


def test_a_line_without_its_line_feed_counts(tmp_path: Path) -> None:
    """A last line that is whole but for the line feed is a record, and stays one when the log is continued."""
    path = tmp_path / "log"
    with StepLog(path) as log:
        log.write(traced_step(step=1))
    path.write_bytes(path.read_bytes().rstrip())
    assert steps_in(path) == [1]
    with StepLog(path) as log:
        log.write(traced_step(step=2))
    assert steps_in(path) == [1, 2]


def test_size_on_disk_is_bounded(tmp_path: Path) -> None:
    """The log is rotated at its limit, one older part is kept, and what is there reads as one log without a gap."""
    path = tmp_path / "log"
    with StepLog(path, max_bytes=64 * KIB) as log:
        for step in range(1, 400):
            log.write(traced_step(step=step))
            assert sum(part.stat().st_size for part in tmp_path.iterdir()) <= 2 * 64 * KIB
    assert sorted(part.name for part in tmp_path.iterdir()) == ["log", "log.1"]
    found = steps_in(path)
    assert found == list(range(found[0], 400))
    assert rotated_path(path).stat().st_size > 60 * KIB


def test_a_log_that_was_just_rotated_is_read(tmp_path: Path) -> None:
    """Between renaming and the first new line there is only the older part."""
    with StepLog(rotated_path(tmp_path / "log")) as log:
        log.write(traced_step(step=1))
    assert steps_in(tmp_path / "log") == [1]


def test_rotation_counts_what_was_there_before(tmp_path: Path) -> None:
    """A log that is continued is rotated by its whole size."""
    path = tmp_path / "log"
    for step in range(1, 60):
        with StepLog(path, max_bytes=64 * KIB) as log:
            log.write(traced_step(step=step))
    assert rotated_path(path).is_file()
    assert steps_in(path) == list(range(1, 60))


@pytest.mark.parametrize("blocker", ["file in the way", "directory in the way"])
def test_a_log_that_cannot_be_opened(tmp_path: Path, blocker: str) -> None:
    """Before training starts, an unusable path is an error that says what to do."""
    path = tmp_path / "run" / "steps-rank0.jsonl"
    if blocker == "file in the way":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"steps-rank0\.jsonl cannot be written: .*; set log_dir to a directory"):
        StepLog(path)


def test_a_full_disk_costs_a_warning_and_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When nothing can be written any more there is one warning, and training hears nothing of it."""
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    with StepLog(path) as log:
        for step in (1, 2, 3):
            log.write(traced_step(step=step))
        assert log.closed
    assert [record.message for record in caplog.records] == [
        f"memtrace: the step log {path} ends at step 1, training goes on: No space left on device"
    ]


def test_a_disk_that_takes_half_a_line(tmp_path: Path) -> None:
    """What was whole before a disk ran full in the middle of a line can be read, and the log goes on later."""
    path = tmp_path / "log"
    script = """
        import resource
        log = StepLog(sys.argv[1])
        log.write(traced_step(step=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        for step in range(2, 100):
            log.write(replace(traced_step(), step=step))
        print(log.closed)
    """
    with run(script, path) as writer:
        out, err = writer.communicate()
    assert out == "True\n", err
    assert err.count("training goes on: File too large") == 1
    assert path.stat().st_size == 4000
    found = steps_in(path)
    assert found == list(range(1, len(found) + 1))
    with StepLog(path) as log:
        log.write(traced_step(step=50))
    assert steps_in(path) == [*found, 50]


def test_a_directory_that_is_gone_costs_a_warning_and_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rotation that cannot be done ends the log, not the training."""
    path = tmp_path / "run" / "log"
    log = StepLog(path, max_bytes=64 * KIB)
    log.write(traced_step(step=1))
    path.unlink()
    path.parent.rmdir()
    for step in range(2, 100):
        log.write(traced_step(step=step))
    assert log.closed
    assert len(caplog.records) == 1


def test_nothing_is_written_after_close(tmp_path: Path) -> None:
    """Closing twice does nothing, and so does writing to a closed log."""
    log = StepLog(tmp_path / "log")
    log.close()
    log.close()
    log.write(traced_step())
    assert (tmp_path / "log").read_bytes() == b""


def test_the_file_is_not_inherited(tmp_path: Path) -> None:
    """A program that training starts does not keep the log open."""
    with StepLog(tmp_path / "log") as log:
        assert log._file is not None
        assert not os.get_inheritable(log._file.fileno())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such step log"),
        (b"\x89PNG\r\n\x1a\n\n", "must be a step log, one JSON object a line, but no line is one"),
        (b'{"schema":"memtrace.plan/1"}\n', r"log:1: schema must be 'memtrace\.step/1', got 'memtrace\.plan/1'"),
        (b"17\n", "log:1: the document must be an object, got 17"),
    ],
)
def test_what_is_no_step_log(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A file that is missing or something else raises LogFormatError with its place."""
    if content is not None:
        (tmp_path / "log").write_bytes(content)
    with pytest.raises(LogFormatError, match=message):
        steps_in(tmp_path / "log")


def test_a_directory_is_no_step_log(tmp_path: Path) -> None:
    """A directory cannot be read as a log."""
    with pytest.raises(LogFormatError, match="the step log cannot be read: Is a directory"):
        steps_in(tmp_path)


def test_an_empty_log_has_no_records(tmp_path: Path) -> None:
    """A run that has not finished a step has an empty log, which is no error."""
    StepLog(tmp_path / "log").close()
    assert steps_in(tmp_path / "log") == []


def test_zeroes_after_a_power_cut_are_left_out(tmp_path: Path) -> None:
    """A stretch of zeroes, as a file system may leave it, spoils one line only."""
    path = tmp_path / "log"
    with StepLog(path) as log:
        log.write(replace(traced_step(), step=1))
    with path.open("ab") as file:
        file.write(b"\0" * 300)
    with StepLog(path) as log:
        log.write(traced_step(step=2))
    assert steps_in(path) == [1, 2]

"""How a run has ended is known afterwards, whatever ended it; and runs are told apart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memtrace.cli import main
from memtrace.exporters.run_directory.run_file import RunStatus, read_run_file
from memtrace.exporters.run_directory.steplog import read_step_log

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Every way in which a run ends, each in a directory of its own, and the exit codes."""
    root = tmp_path_factory.mktemp("ways")
    done = subprocess.run(
        [sys.executable, str(TESTS / "faults" / "ways_to_end.py"), str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def status(directory: Path) -> RunStatus:
    found = read_run_file(directory / "log" / "run-rank0.json")
    assert found is not None
    return found


def in_text(directory: Path) -> tuple[str, float]:
    """Returns the state and `memtrace_up` of the text file."""
    (path,) = (directory / "text").glob("memtrace-r-*-rank0.prom")
    lines = path.read_text().splitlines()
    (state,) = [line.partition('state="')[2].partition('"')[0] for line in lines if "memtrace_run_state{" in line]
    (up,) = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("memtrace_up{")]
    return state, up


WAYS = [
    ("well", 0, "ok"),
    ("exception", 1, "exception"),
    ("oom_forward", 1, "out_of_memory"),
    ("oom_backward", 1, "out_of_memory"),
    ("sigterm", -15, "signal"),
    ("own_handler", 7, "signal"),
    ("forked_worker", 0, "ok"),
    ("leaves_with_an_error", 1, "exception"),
    ("leaves_after_an_oom", 1, "out_of_memory"),
    ("leaves_well", 0, "ok"),
    ("detaches_finally", 1, "out_of_memory"),
    ("falls_back", 0, "ok"),
]


@pytest.mark.parametrize(("way", "code", "state"), WAYS)
def test_the_end_leaves_a_sign(ended: tuple[Path, dict[str, int]], way: str, code: int, state: str) -> None:
    """Run file, text file and target file say it; exit code and traceback are the script's own."""
    root, codes = ended
    directory = root / way
    assert codes[way] == code
    found = status(directory)
    assert (found.state, found.is_live) == (state, False)
    assert found.model
    if way.startswith("oom_"):
        assert found.figures.ooms == 1
    assert in_text(directory) == (state, 0)
    target = directory / "log" / "target-rank0.json"
    if state == "ok":
        assert not target.exists()
    else:
        (group,) = json.loads(target.read_text())
        assert group["targets"] == []
        assert group["labels"]["__meta_memtrace_state"] == state
    stderr = (directory / "stderr").read_text()
    assert stderr.count("Traceback") == (code == 1 and not way.startswith("leaves"))
    assert bool(stderr) == (code == 1 and way != "leaves_with_an_error")


def test_the_endpoint_stays_for_one_scrape_where_asked(ended: tuple[Path, dict[str, int]]) -> None:
    """An uncaught OOM is read by the scrape that comes after it, with all else that was known."""
    scraped = (ended[0] / "oom_forward.scrape").read_text()
    assert re.search(r'^memtrace_run_state{rank="0",run="r",run_id="[^"]+",state="out_of_memory"} 1.0$', scraped, re.M)
    assert 'memtrace_up{rank="0"} 0.0' in scraped
    assert 'memtrace_ooms_total{rank="0"} 1.0' in scraped


def test_a_killed_run_is_gone_without_a_sign(
    ended: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL leaves `running` behind: process and start tell that it is not, and `memtrace show` says so."""
    root, _ = ended
    found = status(root / "twins")
    assert (found.state, found.is_live) == ("running", False)
    assert main(["show", str(root / "twins" / "log")]) == 0
    assert "gone without a sign of its end" in " ".join(capsys.readouterr().out.split())


def test_two_processes_of_one_script_do_not_share_a_file(ended: tuple[Path, dict[str, int]]) -> None:
    """The second has a directory of its own, which it names; both logs are of one launch each."""
    root, codes = ended
    assert codes["twin"] == 0
    (second,) = (root / "twins" / "log").glob("run-*/steps-rank0.jsonl")
    launches = [
        {record.run_id for record in read_step_log(log)} for log in (second.parent.parent / second.name, second)
    ]
    assert [len(found) for found in launches] == [1, 1]
    assert not set.intersection(*launches)
    assert str(second.parent) in (root / "twins" / "stderr").read_text()


def test_two_processes_of_one_script_have_text_files_of_their_own(ended: tuple[Path, dict[str, int]]) -> None:
    """In one directory of node_exporter's, at one time, under one name: both are there, and no series is in both."""
    files = list((ended[0] / "twins" / "text").glob("memtrace-r-*-rank0.prom"))
    series = [
        {line.rpartition(" ")[0] for line in path.read_text().splitlines() if not line.startswith("#")}
        for path in files
    ]
    assert len(files) == 2
    assert all(any(one.startswith("memtrace_run_state{") for one in found) for found in series)
    assert not set.intersection(*series)


def test_a_rerun_takes_over_the_directory(ended: tuple[Path, dict[str, int]]) -> None:
    """The killed run's target is replaced, its records stay in the log, and the two launches differ."""
    root, codes = ended
    assert (codes["sigkill"], codes["again"]) == (-9, 0)
    assert status(root / "sigkill").state == "ok"
    assert not (root / "sigkill" / "log" / "target-rank0.json").exists()
    records = list(read_step_log(root / "sigkill" / "log" / "steps-rank0.jsonl"))
    assert len({record.run_id for record in records}) == 2

"""The text file for node_exporter: whole, of one run, and gone when it has had its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from records import cpu_snapshot, gpu_snapshot
from test_prometheus import samples, series

from memtrace.errors import OutputError
from memtrace.exporters.textfile import KEPT_SECONDS, clear_ended, textfile_path, write_textfile
from memtrace.record.snapshot import RunIdentity, RunState


def test_the_textfile_is_the_exposition(tmp_path: Path) -> None:
    """The file for node_exporter holds all series but one, each with the run, and nothing else is left beside it."""
    identity = replace(gpu_snapshot().identity, run_id="4711")
    path = textfile_path(tmp_path / "new", identity)
    write_textfile(path, gpu_snapshot(identity=identity))
    write_textfile(path, gpu_snapshot(identity=identity, up=False))
    assert path.name == "memtrace-llama-4711-rank1.prom"
    assert list(path.parent.iterdir()) == [path]
    found = series(path.read_text(encoding="utf-8"))
    whole = {
        (name, tuple(sorted({*labels, ("run", "llama"), ("run_id", "4711")}))): value
        for (name, labels), value in samples(gpu_snapshot(identity=identity, up=False)).items()
        if name != "memtrace_run_info"
    }
    assert whole == found


@pytest.mark.parametrize("runs", [(("job-a", ""), ("job-b", "")), (("job", "1"), ("job", "2"))])
def test_runs_on_one_host_are_told_apart(tmp_path: Path, runs: tuple[tuple[str, str], ...]) -> None:
    """Two runs of rank 0 leave two files, those of one name too, and no series of one is a series of the other."""
    found = []
    for name, launch in runs:
        snapshot = cpu_snapshot(identity=RunIdentity(run_name=name, run_id=launch))
        path = textfile_path(tmp_path, snapshot.identity)
        write_textfile(path, snapshot)
        found.append(set(series(path.read_text(encoding="utf-8"))))
    assert len(list(tmp_path.iterdir())) == 2
    assert not found[0] & found[1]


@pytest.mark.parametrize("name", ["a/b", "a_b", "../a", "a b", "caf\udce9", "\ud800", "", "x" * 300, "x" * 301])
def test_every_name_has_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    """Whatever a run is called: a file in the directory that was given, which another name does not take."""
    path = textfile_path(tmp_path, RunIdentity(run_name=name))
    write_textfile(path, cpu_snapshot(identity=RunIdentity(run_name=name)))
    assert path.parent == tmp_path
    assert textfile_path(tmp_path, RunIdentity(run_name="x" * 300, run_id=name or "0")).parent == tmp_path
    assert path != textfile_path(tmp_path, RunIdentity(run_name=f"{name}_"))
    assert path != textfile_path(tmp_path, RunIdentity(run_name=name.replace("/", "_") + "/"))


def test_a_textfile_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A directory in the file's place is an OutputError, and no half file is left."""
    path = textfile_path(tmp_path, gpu_snapshot().identity)
    (path / "x").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"\.prom cannot be written: Is a directory"):
        write_textfile(path, gpu_snapshot())
    assert list(tmp_path.iterdir()) == [path]


def left(directory: Path, name: str, run_id: str, state: RunState, **told: object) -> Path:
    """Leaves the file of a launch, an hour ago, of this process unless told otherwise."""
    identity = RunIdentity(run_name=name, run_id=run_id)
    path = textfile_path(directory, identity)
    write_textfile(path, cpu_snapshot(identity=identity, state=state))
    first, _, rest = path.read_text().partition("\n")
    mark, written = first.split("{", 1)
    path.write_text(f"{mark}{json.dumps(json.loads('{' + written) | told)}\n{rest}")
    before = time.time() - KEPT_SECONDS - 1
    os.utime(path, (before, before))
    return path


def test_the_next_run_of_a_name_clears_what_has_ended(tmp_path: Path) -> None:
    """Ended or killed an hour ago, they go; what runs, is young, foreign or of another name or machine stays."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    for state in (RunState.OK, RunState.OUT_OF_MEMORY):
        left(tmp_path, "job", state.value, state)
    left(tmp_path, "job", "killed", RunState.RUNNING, pid=gone.pid)
    young = left(tmp_path, "job", "young", RunState.OK)
    os.utime(young)
    foreign = tmp_path / "memtrace-job-rank0.prom"
    foreign.write_text("a_metric 1\n")
    broken = tmp_path / "memtrace-job-1-rank0.prom"
    broken.write_text("# memtrace.textfile/1 {\n")
    os.utime(foreign, (0, 0))
    os.utime(broken, (0, 0))
    stay = {
        left(tmp_path, "job", "running", RunState.RUNNING),
        left(tmp_path, "job", "far", RunState.OK, host="another-machine"),
        left(tmp_path, "job-2", "other", RunState.OK),
        young,
        foreign,
        broken,
    }
    clear_ended(tmp_path, "job")
    assert set(tmp_path.iterdir()) == stay

"""Rows of the fault table about the end: of a tracer that nobody detached, of a forked child, of the interpreter."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from faults.fault_training import assert_same, batches, make, run_steps, state_of, train

from memtrace import MemoryTracer, TracerConfig
from memtrace.exporters.run_directory.steplog import read_step_log

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path)), "OMP_NUM_THREADS": "1"}
STEPS = 6


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """The final state without memtrace."""
    return train(steps=STEPS)


def config(tmp_path: Path) -> TracerConfig:
    directories = {"log_dir": tmp_path / "log", "textfile_dir": tmp_path / "text"}
    return TracerConfig(port=0, run_name="r", run_id="1", trace_every=2, quiet=True, **directories)


def text_file(tmp_path: Path) -> str:
    return (tmp_path / "text" / "memtrace-r-1-rank0.prom").read_text()


def port_of(tracer: MemoryTracer) -> int:
    assert tracer.url is not None
    return int(tracer.url.rpartition(":")[2].partition("/")[0])


def memtrace_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("memtrace")]


def up_in_text(tmp_path: Path) -> float:
    """Returns what the text file says of `memtrace_up`."""
    (line,) = [line for line in text_file(tmp_path).splitlines() if line.startswith("memtrace_up{")]
    return float(line.rpartition(" ")[2])


def train_and_drop(tmp_path: Path) -> tuple[list[torch.Tensor], int, weakref.ref[MemoryTracer]]:
    """Trains under a tracer that nobody detaches; returns the weights, the port, and the tracer as far as it lives."""
    model, optimizer = make()
    tracer = MemoryTracer(model, optimizer, config(tmp_path))
    tracer.attach()
    run_steps(model, optimizer, batches(STEPS))
    return state_of(model), port_of(tracer), weakref.ref(tracer)


def test_tracer_dropped_without_detach(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """The port is given back, target file and threads go, the log is whole, and the text file says that it is over."""
    state, port, tracer = train_and_drop(tmp_path)
    threads = memtrace_threads()
    gc.collect()
    assert tracer() is None
    with socket.create_server(("127.0.0.1", port)):
        pass
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in (tmp_path / "log").glob("*.json*")) == [
        "run-rank0.json",
        "steps-rank0.jsonl",
        "timeline-rank0.json",
    ]
    assert len(list(read_step_log(tmp_path / "log" / "steps-rank0.jsonl"))) == STEPS
    assert up_in_text(tmp_path) == 0
    assert f'memtrace_steps_total{{rank="0",run="r",run_id="1"}} {STEPS}.0' in text_file(tmp_path)
    assert_same(state, expected)


DROP_ON_THE_ACCEPTING_THREAD = """
import gc, sys, threading
from pathlib import Path
from faults.test_fault_exits import memtrace_threads, train_and_drop
from memtrace.exporters.endpoint.wsgi import BoundedServer

BoundedServer.service_actions = lambda server: ready.is_set() and gc.collect()
ready = threading.Event()
gc.disable()
_, _, tracer = train_and_drop(Path(sys.argv[1]))
assert tracer() is not None
threads = memtrace_threads()
ready.set()
for thread in threads:
    thread.join()
print(tracer(), flush=True)
"""


def test_tracer_collected_on_the_servers_own_thread(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """The collector, which runs on any thread, waits for none of them."""
    done = subprocess.run(
        [sys.executable, "-c", DROP_ON_THE_ACCEPTING_THREAD, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert up_in_text(tmp_path) == 0


def fork_and_leave(leave: Callable[[], None]) -> None:
    """Forks a child that does something with what it inherited, and then what exit does with memtrace's outputs."""
    child = os.fork()
    if child == 0:
        try:
            leave()
        finally:
            for finalizer in list(weakref.finalize._registry):
                if "memtrace" in str(finalizer.peek()):
                    finalizer()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def start_process(tracer: MemoryTracer) -> None:
    """Starts a child of multiprocessing, which ends in its own way."""
    process = multiprocessing.get_context("fork").Process(target=tracer.detach)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("how", ["exits", "detaches", "trains", "multiprocessing"])
def test_forked_child_ends(tmp_path: Path, expected: list[torch.Tensor], how: str) -> None:
    """Whatever a child does with what it inherited, the parent's port, target, log and text file stay."""
    model, optimizer = make()
    rows = batches(STEPS)
    with MemoryTracer(model, optimizer, config(tmp_path)) as tracer:
        run_steps(model, optimizer, rows[:3])
        target = tmp_path / "log" / "target-rank0.json"
        before = target.read_text()
        if how == "multiprocessing":
            start_process(tracer)
        elif how == "detaches":
            fork_and_leave(tracer.detach)
        elif how == "trains":
            fork_and_leave(lambda: run_steps(model, optimizer, rows[3:]))
        else:
            fork_and_leave(lambda: tracer.__exit__(SystemExit, SystemExit(0), None))
        assert json.loads(target.read_text()) == json.loads(before)
        assert up_in_text(tmp_path) == 1
        with urlopen(tracer.url) as answer:
            assert b"memtrace_up" in answer.read()
        run_steps(model, optimizer, rows[3:])
    assert len(list(read_step_log(tmp_path / "log" / "steps-rank0.jsonl"))) == STEPS
    assert up_in_text(tmp_path) == 0
    assert_same(state_of(model), expected)


LEAVE = """
import os, socket, sys
from pathlib import Path
import torch
from faults.test_fault_exits import config, port_of, text_file
from faults.fault_training import batches, make, run_steps, state_of, train
from memtrace import MemoryTracer

directory, how = Path(sys.argv[1]), sys.argv[2]
expected = train(steps=6)
model, optimizer = make()
tracer = MemoryTracer(model, optimizer, config(directory))
tracer.attach()
if how == "forks first":  # before torch's profiler has run: after it, any child of a plain fork hangs at its exit
    child = os.fork()
    if child == 0:
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (directory / "log/target-rank0.json").exists()
    assert "memtrace_up{rank=\\"0\\",run=\\"r\\",run_id=\\"1\\"} 1.0" in text_file(directory)
run_steps(model, optimizer, batches(6))
clients = [socket.create_connection(("127.0.0.1", port_of(tracer))) for _ in range(3)]
clients[0].sendall(b"GET /metrics HTTP/1.1\\r\\nHost: here\\r\\n\\r\\n" * 50)
clients[1].sendall(b"GET /met")
print(all(map(torch.equal, state_of(model), expected)), flush=True)
if how == "raises":
    raise ValueError("of the script")
if how == "exits with 3":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("ends", 0), ("raises", 1), ("exits with 3", 3), ("forks first", 0)])
def test_script_ends_without_detach(tmp_path: Path, how: str, status: int) -> None:
    """With scrapers connected the interpreter ends at once, with its own status and no word on stderr but its own."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, str(tmp_path), how],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "True\n"), done.stderr
    if how == "raises":
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("ValueError: of the script\n")
        assert done.stderr.count("Traceback") == 1
    else:
        assert done.stderr == ""
    target = tmp_path / "log" / "target-rank0.json"
    failed = how in ("raises", "exits with 3")  # then the file stays, and says so
    assert json.loads(target.read_text())[0]["targets"] == [] if failed else not target.exists()
    assert len(list(read_step_log(tmp_path / "log" / "steps-rank0.jsonl"))) == STEPS
    assert up_in_text(tmp_path) == 0


def test_text_directory_gone_at_the_end(
    tmp_path: Path, expected: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """A text file that cannot be written any more costs one warning."""
    model, optimizer = make()
    with MemoryTracer(model, optimizer, config(tmp_path)):
        run_steps(model, optimizer, batches(STEPS))
        shutil.rmtree(tmp_path / "text")
        (tmp_path / "text").touch()
    assert_same(state_of(model), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text

"""Rows of the fault table that need a process of their own: drivers, permissions and signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stub_nvml import StubLibraries, StubProcess

from memtrace.exporters.run_directory.steplog import read_step_log

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path)), "OMP_NUM_THREADS": "1"}
DEVICE = "device GPU-1 Stub\ntotal 1000\nfree 400\nused 600\n"

TRAIN_WITH_DRIVER = """
    sys.path.insert(0, {tests!r})
    import torch
    from faults.fault_training import batches, make, run_steps, state_of, train
    import memtrace.tracing.watch
    from memtrace import MemoryTracer, TracerConfig

    memtrace.tracing.watch.open_device = lambda *_: open_device("cuda", "GPU-1")
    expected = train(steps=20)
    model, optimizer = make()
    config = TracerConfig(port=None, step_log=False, trace_every=10, device_poll_seconds={period})
    with MemoryTracer(model, optimizer, config) as tracer:
        run_steps(model, optimizer, batches(20))
        up = tracer.snapshot().up
    read = [record.device_memory for record in tracer.history]
    result = dict(
        same=all(map(torch.equal, state_of(model), expected)),
        up=up,
        steps=len(read),
        first=read[0] and read[0].total_bytes,
        last=read[-1] and read[-1].total_bytes,
    )
"""


def train_with_driver(process: StubProcess, period: float) -> dict:
    """Trains in a process whose device is said to be a GPU, with the driver that it has."""
    return process.run(TRAIN_WITH_DRIVER.format(tests=str(TESTS), period=period))


def test_driver_library_missing(stub_libraries: StubLibraries, tmp_path: Path) -> None:
    """Without a driver library there are no readings, and nothing else is missing."""
    process = StubProcess(stub_libraries.broken, tmp_path / "says")
    try:
        done = train_with_driver(process, period=0.001)
    finally:
        process.close()
    assert done == {"same": True, "up": True, "steps": 20, "first": None, "last": None}


def test_driver_fails_at_init(stub_driver: StubProcess) -> None:
    """A driver that refuses to start gives no readings."""
    stub_driver.says(f"{DEVICE}refuse nvmlInitWithFlags 9\n")
    done = train_with_driver(stub_driver, period=0.001)
    assert done == {"same": True, "up": True, "steps": 20, "first": None, "last": None}


def test_driver_fails_at_its_fifth_call(stub_driver: StubProcess) -> None:
    """A driver that fails on the way gives no more readings, and memtrace stays up."""
    stub_driver.says(DEVICE)
    calls = stub_driver.run("result = calls()")
    stub_driver.says(f"{DEVICE}fail_from {calls + 5} 999\n")
    done = train_with_driver(stub_driver, period=0)
    assert done["same"]
    assert done["up"]
    assert done["last"] is None
    stub_driver.says(DEVICE)


def test_driver_hangs(stub_driver: StubProcess) -> None:
    """A driver that does not come back costs its readings, not the training."""
    stub_driver.says(f"{DEVICE}hang nvmlDeviceGetMemoryInfo_v2\n")
    done = train_with_driver(stub_driver, period=0.001)
    stub_driver.says(DEVICE)
    assert done["same"]
    assert done["up"]
    assert done["last"] is None
    stub_driver.run("import time\nwhile hanging(): time.sleep(0.01)\nresult = None")
    stub_driver.run("for thread in threading.enumerate():\n    thread.name.startswith('memtrace') and thread.join()")


TRAIN_IN_READ_ONLY = """
import os, sys, torch
from faults.fault_training import batches, make, run_steps, state_of, train
from memtrace import MemoryTracer, TracerConfig

os.chdir(sys.argv[1])
expected = train(steps=300)
model, optimizer = make()
config = TracerConfig(port=None, log_dir="run", log_max_bytes=65536, trace_every=0, device_poll_seconds=0)
rows = batches(300)
with MemoryTracer(model, optimizer, config) as tracer:
    run_steps(model, optimizer, rows[:2])
    os.chmod("run", 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # permissions do not bind root
    run_steps(model, optimizer, rows[2:])
    print("up", tracer.snapshot().up, "steps", tracer.snapshot().totals.steps)
print("same", all(map(torch.equal, state_of(model), expected)))
"""


def test_log_directory_becomes_read_only(tmp_path: Path) -> None:
    """A log that cannot be rotated any more ends with a warning; training and metrics go on."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_IN_READ_ONLY, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout.splitlines() == ["up True steps 300", "same True"]
    assert "Permission denied" in done.stderr
    steps = [record.step for record in read_step_log(tmp_path / "run" / "steps-rank0.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


TRAIN_FOR_EVER = """
import itertools, sys
from faults.fault_training import batches, make, run_steps
from memtrace import MemTraceOptimizer

model, optimizer = make()
optimizer = MemTraceOptimizer(optimizer, model, port=0, log_dir=sys.argv[1], trace_every=20)
rows = batches(10)
run_steps(model, optimizer, rows)
print(optimizer.tracer.url, flush=True)
for _ in itertools.count():
    run_steps(model, optimizer, rows)
"""


@contextmanager
def endless_training(log_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that trains until it is killed, and the port of its endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_FOR_EVER, str(log_dir)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2].partition("/")[0])
        yield process, port
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """memtrace neither catches nor delays a signal: the log is readable up to its last whole line, the port free."""
    with endless_training(tmp_path) as (process, port):
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
        with socket.create_server(("127.0.0.1", port)):
            pass
    steps = [record.step for record in read_step_log(tmp_path / "steps-rank0.jsonl")]
    assert len(steps) >= 10
    assert steps == list(range(1, len(steps) + 1))

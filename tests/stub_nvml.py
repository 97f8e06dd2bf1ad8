"""Pytest plugin: a driver library built with cc, loaded through the real pynvml in another process.

    def test_x(stub_driver):
        stub_driver.says("device GPU-1 Stub\\ntotal 1000\\nfree 1000")
        reading = stub_driver.run("device = NvmlDevice('1'); result = fields(device.read()); device.close()")

What the library understands is described in `sources/stub_nvml.c`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_SOURCE = Path(__file__).parent / "sources" / "stub_nvml.c"
_LIBRARY = "libnvidia-ml.so.1"
_SECONDS_PER_RUN = 60

_WORKER = f"""
import ctypes, dataclasses, json, os, signal, sys, threading, traceback
from functools import partial
from pathlib import Path
import pynvml
from memtrace.errors import DeviceUnavailable
from memtrace.sources.devices.readers import open_device
from memtrace.sources.devices.sampler import DeviceSampler
from memtrace.sources.devices.nvml import NvmlDevice

def says(text):
    draft = Path(os.environ["STUB_NVML"] + ".draft")
    draft.write_text(text)
    draft.replace(os.environ["STUB_NVML"])

def references(): return ctypes.CDLL({_LIBRARY!r}).stub_references()
def calls(): return ctypes.CDLL({_LIBRARY!r}).stub_calls()
def hanging(): return ctypes.CDLL({_LIBRARY!r}).stub_hanging()
def fields(reading): return dataclasses.asdict(reading)

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    signal.alarm({_SECONDS_PER_RUN})
    names = dict(globals(), result=None)
    try:
        exec(json.loads(line), names)
        reply = dict(result=names["result"])
    except Exception:
        reply = dict(error=traceback.format_exc())
    print(json.dumps(reply), file=replies, flush=True)
    signal.alarm(0)
"""


class StubProcess:
    """A Python process that loads a driver library of ours and runs what a test sends it."""

    def __init__(self, library_directory: Path, control: Path) -> None:
        self.control = control
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=stub_environment(library_directory, control),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def says(self, text: str) -> None:
        """Makes the driver answer as the text describes, from its next call on."""
        self.control.write_text(text)

    def run(self, source: str) -> Any:
        """Runs Python statements there and returns the JSON value they leave in `result`.

        They can use NvmlDevice, DeviceSampler, DeviceUnavailable, open_device, partial, Path, pynvml, modules of the
        standard library, `fields(reading)`, `says(text)`, and of the stub its counts `references()`, `calls()` and
        `hanging()`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(textwrap.dedent(source)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process with the stub driver has died"
        reply = json.loads(answer)
        assert "error" not in reply, reply["error"]
        return reply["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True, kw_only=True)
class StubLibraries:
    """Directories for LD_LIBRARY_PATH, each with one driver library."""

    current: Path
    """A driver as of today."""
    without_memory_v2: Path
    """An older one, which lacks nvmlDeviceGetMemoryInfo_v2."""
    broken: Path
    """A file that is no library."""


def stub_environment(library_directory: Path, control: Path) -> dict[str, str]:
    """Returns the environment of a process that is to load a driver library of ours."""
    return {**os.environ, "LD_LIBRARY_PATH": str(library_directory), "STUB_NVML": str(control)}


@pytest.fixture(scope="session")
def stub_libraries(tmp_path_factory: pytest.TempPathFactory) -> StubLibraries:
    """The driver libraries, built once."""
    root = tmp_path_factory.mktemp("driver")
    libraries = StubLibraries(current=root / "current", without_memory_v2=root / "old", broken=root / "broken")
    for directory, option in ((libraries.current, "-O1"), (libraries.without_memory_v2, "-DWITHOUT_MEMORY_V2")):
        directory.mkdir()
        built = str(directory / _LIBRARY)
        command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", option, "-o", built, str(_SOURCE)]
        subprocess.run(command, check=True)
    libraries.broken.mkdir()
    (libraries.broken / _LIBRARY).touch()
    return libraries


@pytest.fixture(scope="session")
def _shared_process(stub_libraries: StubLibraries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubProcess]:
    process = StubProcess(stub_libraries.current, tmp_path_factory.mktemp("control") / "says")
    yield process
    process.close()


@pytest.fixture
def stub_driver(_shared_process: StubProcess) -> Iterator[StubProcess]:
    """A process with the current driver, shared by all tests: each has to give back every count it took."""
    _shared_process.says("")
    yield _shared_process
    assert _shared_process.run("result = references()") == 0, "the library's initialisation was not given back"

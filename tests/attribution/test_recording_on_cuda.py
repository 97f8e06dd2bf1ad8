"""A run on a CUDA device that keeps a recording and then fails, from the hooks to the command and the report.

In the place of torch's allocator is a stand-in that does what one has done on a real H200.
"""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeAllocator
from greedy_training import reports_in
from small_training import make, step

from memtrace import MemoryTracer
from memtrace.attribution import scan
from memtrace.cli import main
from memtrace.exporters.run_directory.allocator_file import allocator_path, read_recording
from memtrace.forensics.as_recording import as_recording
from memtrace.forensics.loader import load_snapshot
from memtrace.record.units import MIB
from memtrace.sources.failures import FAILURES

DEVICE = torch.device("cuda", 0)
TRACES = Path(__file__).parents[1] / "fixtures" / "gpu" / "traces"
NEAR = 0.03
FREE = 10 * MIB
"""What the device has left."""


class H200(FakeAllocator):
    """Allocates what a real allocator has, in its order, with what it reserved for that."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        super().__init__()
        self.trace = recorded["snapshot"]["device_traces"][0]
        self.peak_reserved = recorded["counters"]["peak_reserved_bytes"]
        self.tell_failure: Any = None
        """torch's observer of failed allocations."""

    def play(self) -> None:
        """Does what was recorded, from an empty device on."""
        for entry in self.trace:
            if entry["action"] == "alloc":
                self.allocate(entry["addr"], entry["size"])
            elif entry["action"] == "free_completed":
                self.free(entry["addr"])

    def fail(self, requested: int) -> None:
        """Tells its observer and raises, as torch does."""
        self.tell_failure(0, requested, self.peak_reserved + FREE, FREE)
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {requested / MIB:.2f} MiB.")

    def stats(self) -> dict[str, Any]:
        """With what a real one had reserved."""
        return {
            **super().stats(),
            "reserved_bytes": {"all": {"current": self.peak_reserved, "peak": self.peak_reserved}},
        }


@pytest.fixture(params=["tiny", "llama"])
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((TRACES / f"{request.param}.json").read_text(encoding="utf-8"))


@pytest.fixture
def device(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> H200:
    made = H200(recorded)
    made.install(monkeypatch)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(scan, "device_of", lambda model: DEVICE)
    monkeypatch.setattr(FAILURES, "_observing", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a", major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (FREE, made.peak_reserved + FREE))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: made.peak_reserved)
    observe = partial(setattr, made, "tell_failure")
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observe, raising=False)
    return made


def test_a_run_that_fails_on_a_gpu_leaves_the_comparison(
    recorded: dict[str, Any], device: H200, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recording has what the real allocator was asked for; its command and the report give what that reserved."""
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "log_dir": tmp_path}
    with (
        pytest.raises(torch.OutOfMemoryError),
        MemoryTracer(model, optimizer, allocator_recording=True, **settings) as tracer,
    ):
        with model.register_forward_hook(lambda *_: device.play()):
            step(model, optimizer)
        assert tracer.latest is not None
        assert (tracer.latest.device, tracer.latest.traced) == ("cuda:0", True)
        assert allocator_path(tmp_path, 0).exists()
        with model.head.register_forward_hook(lambda *_: device.fail(requested=40 * MIB)):
            step(model, optimizer)

    kept = read_recording(allocator_path(tmp_path, 0))
    assert kept.origin == "step 1 of rank 0 on cuda:0"
    dumped = tmp_path / "recorded.pickle"
    dumped.write_bytes(pickle.dumps(recorded["snapshot"]))
    assert [*kept.events] == [*as_recording(load_snapshot(dumped)).events]
    assert (kept.peak_reserved_bytes, kept.limit_bytes) == (device.peak_reserved, device.peak_reserved + FREE)

    capsys.readouterr()
    assert main(["allocator", str(tmp_path), "--what-if", "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    (in_force,) = (outcome for outcome in outcomes if outcome["in_force"])
    assert abs(in_force["reserved_bytes"] - device.peak_reserved) <= NEAR * device.peak_reserved

    (report,) = reports_in(tmp_path)
    assert (report.device, report.request.pending) == ("cuda:0", False)
    assert (report.request.requested_bytes, report.request.free_bytes) == (40 * MIB, FREE)
    assert report.allocator_answer is not None
    saved = {outcome.settings: outcome.saved_bytes for outcome in report.allocator_answer.outcomes}
    assert saved == {outcome["settings"]: outcome["saved_bytes"] for outcome in outcomes if outcome["fits"]}
    for outcome in report.allocator_answer.outcomes:
        assert outcome.would_fit is (outcome.saved_bytes >= 40 * MIB - FREE)
    (text,) = tmp_path.glob("oom-rank0-*.md")
    sections = [line for line in text.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert sections[-1] == "## Other settings of the allocator"

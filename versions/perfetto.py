"""Reads exported runs with Perfetto's own trace processor: `make perfetto TRACE_PROCESSOR=PATH`.

The package `perfetto` drives a binary that it downloads, and that no package carries. So it is named here: a
`trace_processor_shell` that was downloaded or built. What came of it stands in docs/viewers.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from memtrace import MemoryTracer, Moment, StepRecord, TracerConfig
from memtrace.cli import main as memtrace
from memtrace.exporters.traces.events import FIRST_PID, MEMORY_TRACK, PEAK_TRACK, TOTAL_TRACK
from memtrace.record.categories import Category
from versions.environments import ROOT, environment

WANTED = ("perfetto==0.59.1", "numpy", "pandas")
QUERIES = {
    "processes": "select pid, name from process where name like 'memtrace%'",
    "slices": "select s.name, s.ts, s.dur, s.depth from slice s join thread_track t on s.track_id = t.id "
    f"join thread using (utid) where tid = {FIRST_PID} and s.dur > 0 order by s.ts",
    "marks": "select s.name, s.ts from slice s join thread_track t on s.track_id = t.id "
    f"join thread using (utid) where tid = {FIRST_PID} and s.dur = 0 order by s.ts",
    "counters": "select t.name, c.ts, c.value from counter c join process_counter_track t on c.track_id = t.id "
    f"join process using (upid) where pid = {FIRST_PID} order by c.ts",
    "errors": "select name, value from stats where severity in ('error', 'data_loss') and value > 0",
    "all": "select count(*) from slice",
}
READER = """
import json, sys
from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig
binary, trace, queries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = {}
with TraceProcessor(trace=trace, config=TraceProcessorConfig(bin_path=binary)) as processor:
    for name, query in queries.items():
        answer = processor.query(query)
        found[name] = [[getattr(row, column) for column in answer.column_names] for row in answer]
print(json.dumps(found))
"""


class Wrong(Exception):
    """What the trace processor has is not what the records say; the message says where."""


def read(python: Path, binary: Path, trace: Path) -> dict[str, list[list[Any]]]:
    """Returns the rows of each query.

    Raises:
        Wrong: the trace processor did not answer, or has lost something of the file.
    """
    words = [str(python), "-c", READER, str(binary), str(trace), json.dumps(QUERIES)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Wrong(f"the trace processor did not answer:\n{done.stderr[-2000:]}")
    found: dict[str, list[list[Any]]] = json.loads(done.stdout)
    if found["errors"]:
        raise Wrong(f"{trace} is not read whole: {found['errors']}")
    return found


def run(directory: Path) -> Sequence[StepRecord]:
    """Returns the records of a small training with timelines, of which torch.profiler saw the last two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()

    config = TracerConfig(port=None, trace_every=2, timelines=True, quiet=True, log_dir=directory, run_name="run")
    with MemoryTracer(model, optimizer, config) as tracer:
        for _ in range(6):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                step()
        history = tracer.history
    profiler.export_chrome_trace(str(directory / "profiler.json"))
    return history


def check(found: dict[str, list[list[Any]]], records: Sequence[StepRecord], name: str = "run") -> tuple[int, int]:
    """Returns how many counters were read and how many moments of steps they agree with, category by category.

    Args:
        found: the rows of each query.
        records: of the steps that must be there, and no others.
        name: of the run.

    Raises:
        Wrong: a step, a mark or a byte differs.
    """
    _equal("the processes", found["processes"], [[FIRST_PID, f"memtrace: {name}, rank 0 on cpu"]])
    _equal("the steps", [step for step, *_ in found["slices"]], [f"step {record.step}" for record in records])
    _equal("the depths of steps", {depth for *_, depth in found["slices"]}, {0})
    tracks: dict[str, dict[int, int]] = defaultdict(dict)
    for track, at, value in found["counters"]:
        tracks[track][at] = int(value)
    moments = 0
    for record, (_, begin, length, _) in zip(records, found["slices"], strict=True):
        marks = {mark: at for mark, at in found["marks"] if begin <= at <= begin + length + 20}
        if record.traced:
            _equal(f"marks of step {record.step}", sorted(marks), sorted(moment.value for moment in record.moments))
        else:
            marks = {"step_end": max(at for at in tracks[f"{TOTAL_TRACK} bytes"] if at <= begin + length + 20)}
        for moment, at in marks.items():
            breakdown = record.moments[Moment(moment)]
            where = f"{moment} of step {record.step}"
            _equal(where, tracks[f"{TOTAL_TRACK} bytes"].get(at), breakdown.total_bytes)
            _same(where, tracks, MEMORY_TRACK, at, breakdown)
            moments += 1
        if Moment.PEAK in record.moments:
            _same(f"peak of step {record.step}", tracks, PEAK_TRACK, begin, record.moments[Moment.PEAK])
            moments += 1
    return len(found["counters"]), moments


def _same(where: str, tracks: dict[str, dict[int, int]], track: str, at: int, breakdown: Any) -> None:
    for category in Category:
        _equal(f"{category} at {where}", tracks.get(f"{track} {category}", {}).get(at, 0), breakdown[category])


def _equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Wrong(f"{what}: Perfetto has {found}, the records say {expected}")


def main() -> int:
    """Exports a run, reads it, and returns 1 where Perfetto has something else than the records."""
    parser = argparse.ArgumentParser(prog="python -m versions.perfetto", description=__doc__)
    parser.add_argument("--trace-processor", type=Path, required=True, help="path of a trace_processor_shell")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-versions", help="where perfetto is kept")
    arguments = parser.parse_args()
    binary = arguments.trace_processor.absolute()
    if not binary.is_file():
        parser.error(f"--trace-processor must be a trace_processor_shell of Perfetto, but {binary} is no file")
    python = environment(arguments.environments.absolute() / "perfetto", WANTED)
    with TemporaryDirectory() as name:
        directory = Path(name)
        records = run(directory)
        alone, beside = directory / "alone.json", directory / "beside.json"
        memtrace(["export", name, "--perfetto", str(alone)])
        memtrace(["export", name, "--perfetto", str(beside), "--profiler", str(directory / "profiler.json")])
        try:
            counters, moments = check(read(python, binary, alone), records)
            both = read(python, binary, beside)
            check(both, records[-2:])
        except Wrong as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{counters} counters: {moments} moments of {len(records)} steps are those of the records, to the byte")
    print(f"beside torch.profiler: {both['all'][0][0]} slices and marks, with those of the last two steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())

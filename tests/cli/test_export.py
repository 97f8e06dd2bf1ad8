"""`memtrace export`: a run for Perfetto, also beside a trace of torch.profiler, and as CSV."""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from exporters.trace_reader import read_trace
from records import traced_step
from small_training import make, step
from torch.profiler import ProfilerActivity, profile

from memtrace import MemoryTracer, TracerConfig
from memtrace.cli import main
from memtrace.exporters.csv_table import COLUMNS
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.exporters.run_directory.timeline_file import timeline_path
from memtrace.exporters.traces.events import FIRST_PID
from memtrace.record.breakdown import AllocatorReading, StepRecord
from memtrace.record.categories import Category, Moment
from versions import perfetto


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[StepRecord, ...]]:
    """A real run of five steps, of which torch.profiler saw the last two, and its records."""
    directory = tmp_path_factory.mktemp("run")
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 2, "device_poll_seconds": 0, "quiet": True}
    settings["timelines"] = True
    with MemoryTracer(model, optimizer, TracerConfig(log_dir=directory, run_name="llama", **settings)) as tracer:
        for rows in (6, 48, 6):
            step(model, optimizer, rows)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                step(model, optimizer, 6)
        history = tracer.history
    profiler.export_chrome_trace(str(directory / "profiler.json"))
    return directory, history


def exported(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["export", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_counters_of_a_trace_are_the_records(
    run: tuple[Path, tuple[StepRecord, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every moment of the step with a timeline, the end of all others and every peak, category by category."""
    directory, history = run
    tables = read_trace(exported(capsys, directory, "--perfetto", "-"))
    assert tables.processes == {FIRST_PID: "memtrace: llama, rank 0 on cpu"}
    assert [name for _, name, _, _ in tables.slices] == [f"step {record.step}" for record in history]
    # A viewer cuts each time to a nanosecond: a begin and a length may each be one less than what was written.
    spans = {name: (begin, begin + length + 10 + 2) for _, name, begin, length in tables.slices}
    totals = dict(tables.sums(FIRST_PID, "memory in all"))
    for record in history:
        begin, end = spans[f"step {record.step}"]
        marks = {name: at for _, name, at in tables.marks if begin <= at <= end}
        assert set(marks) == (set(Moment) if record.traced else set())
        if not record.traced:
            marks = {"step_end": max(at for at in totals if at <= end)}
            assert marks["step_end"] >= end - 4
        for moment, at in marks.items():
            assert totals[at] == record.moments[Moment(moment)].total_bytes, (record.step, moment)
            for category in Category:
                points = dict(tables.counters.get((FIRST_PID, f"memory {category}"), []))
                assert points.get(at, 0) == record.moments[Moment(moment)][category], (record.step, moment, category)
    peaks = [total for _, total in tables.sums(FIRST_PID, "memory at the peak of the step")]
    assert peaks == [r.moments[Moment.PEAK].total_bytes for r in history if Moment.PEAK in r.moments]
    for (_, _, begin, length), record in zip(tables.slices, history, strict=True):
        assert tables.base_ns + begin + length == pytest.approx(record.unix_seconds * 1e9, abs=1000)
        assert length / 1e9 == pytest.approx(record.step_seconds, abs=1e-6)


def test_what_is_asked_of_perfetto_holds_by_its_rules(
    run: tuple[Path, tuple[StepRecord, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """`make perfetto` asks its trace processor the same, and refuses a byte too many."""
    directory, history = run
    tables = read_trace(exported(capsys, directory, "--perfetto", "-"))
    rows = {
        "processes": [[*one] for one in tables.processes.items()],
        "slices": [[name, begin, length, 0] for _, name, begin, length in tables.slices],
        "marks": [[name, at] for _, name, at in tables.marks],
        "counters": [[name, at, value] for (_, name), points in tables.counters.items() for at, value in points],
    }
    counters, moments = perfetto.check(rows, history, "llama")
    assert counters == len(rows["counters"])
    assert moments == sum(len(record.moments) for record in history) + sum(r.traced for r in history)
    last = history[-1]
    entries = {key: size + 1 for key, size in last.moments[Moment.STEP_END].entries.items()}
    changed = replace(last.moments[Moment.STEP_END], entries=entries)
    wrong = replace(last, moments={**last.moments, Moment.STEP_END: changed})
    with pytest.raises(perfetto.Wrong, match=f"step_end of step {last.step}: Perfetto has"):
        perfetto.check(rows, [*history[:-1], wrong], "llama")


def test_a_trace_of_torch_profiler_has_the_same_clock(
    run: tuple[Path, tuple[StepRecord, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its optimizer steps lie where the steps end that memtrace saw; other steps are left out; found beside, too."""
    directory, history = run
    packed = tmp_path / "profiler.json.gz"
    packed.write_bytes(gzip.compress((directory / "profiler.json").read_bytes()))
    tables = read_trace(exported(capsys, directory, "--perfetto", "-", "--profiler", packed))
    ours = [(begin, begin + length) for pid, _, begin, length in tables.slices if pid == FIRST_PID]
    assert len(ours) == 2
    theirs = [(begin, length) for _, name, begin, length in tables.slices if name.startswith("Optimizer.step")]
    assert len(theirs) == 2
    for (first, last), (begin, length) in zip(ours, theirs, strict=True):
        # A step ends in the optimizer's hook, which the profiler's slice has inside it; clocks within two milliseconds.
        assert first < begin < last + 2_000_000
        assert begin - 2_000_000 < last < begin + length + 2_000_000
    before = json.loads((directory / "profiler.json").read_text())
    merged = json.loads(exported(capsys, directory, "--perfetto", "-", "--profiler", directory / "profiler.json"))
    assert merged["traceEvents"][: len(before["traceEvents"])] == before["traceEvents"]
    assert {name: merged[name] for name in before if name != "traceEvents"} == {
        name: value for name, value in before.items() if name != "traceEvents"
    }
    (directory / "w.1.pt.trace.json").write_text(json.dumps(before))
    try:
        assert len(json.loads(exported(capsys, directory, "--perfetto", "-"))["traceEvents"]) == len(
            merged["traceEvents"]
        )
        (directory / "w.2.pt.trace.json").write_text(json.dumps(before))
        assert main(["export", str(directory), "--perfetto", str(tmp_path / "out.json")]) == 0
        assert "has 2 traces of torch.profiler: name one with --profiler" in capsys.readouterr().err
        assert len(read_trace((tmp_path / "out.json").read_text()).slices) == len(history)
    finally:
        for path in directory.glob("*.pt.trace.json"):
            path.unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"traceEvents": [{"ph": "X", "ts": 5, "dur": 1, "pid": 1}]}', "covers no step of llama"),
        ('{"traceEvents": [{"ph": "M"}]}', "but has no slice"),
        ('{"traceEvents": [1]}', r"traceEvents[0] must be an object"),
        ('{"traceEvents": [{"ph": "X", "ts": "soon"}]}', "traceEvents[0].ts must be a number"),
        ("[]", "must be an object"),
        ("PK", "must be one JSON value"),
    ],
)
def test_what_is_no_trace_of_this_run_is_said(
    run: tuple[Path, tuple[StepRecord, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    """One line names the file and what is wrong with it; nothing is written."""
    (tmp_path / "other.json").write_text(text)
    out = tmp_path / "out.json"
    assert main(["export", str(run[0]), "--perfetto", str(out), "--profiler", str(tmp_path / "other.json")]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_timeline_of_an_earlier_launch_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file names its step only: where its peak is not that of the record, it is of another run."""
    with StepLog(step_log_path(tmp_path, 1)) as log:
        log.write(traced_step(step=2))
    curve = {"seconds": [0.0], "moments": {"peak": 0.0}, "categories": {"weights": [5]}}
    head = {"schema": "memtrace.timeline/1", "step": 2, "rank": 1}
    timeline_path(tmp_path, 1).write_text(json.dumps(head | curve))
    assert main(["export", str(tmp_path), "--perfetto", "-"]) == 0
    printed = capsys.readouterr()
    assert "no timeline of rank 1 is of a step in its log" in printed.err
    tables = read_trace(printed.out)
    assert tables.marks == []
    assert [total for _, total in tables.sums(FIRST_PID + 1, "memory in all")] == [
        traced_step().moments[Moment.STEP_END].total_bytes
    ]


def test_ranks_are_processes_and_a_clock_that_goes_back_is_no_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank has a process and a thread of its own; the allocator's three parts add up to what it holds."""
    reading = AllocatorReading(allocated_bytes=5, reserved_bytes=20, private_pool_bytes=3)
    for rank in (0, 7):
        with StepLog(step_log_path(tmp_path, rank)) as log:
            for number, at in enumerate((100.0, 100.1, 99.0, 103.0), 1):
                log.write(traced_step(step=number, rank=rank, unix_seconds=at, step_seconds=0.5, allocator=reading))
    tables = read_trace(exported(capsys, tmp_path, "--perfetto", "-"))
    assert list(tables.threads) == [FIRST_PID, FIRST_PID + 7]
    assert len(tables.slices) == 8
    assert {total for _, total in tables.sums(FIRST_PID + 7, "allocator")} == {20}
    one = read_trace(exported(capsys, tmp_path, "--rank", "7", "--perfetto", "-"))
    assert list(one.processes) == [FIRST_PID + 7]
    assert main(["export", str(tmp_path), "--rank", "3", "--csv", "-"]) == 2
    assert "has no log of rank 3, only of 0, 7" in capsys.readouterr().err


def test_a_table_has_a_row_for_each_entry(
    run: tuple[Path, tuple[StepRecord, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of a step and moment add up to the record; docs/viewers.md reads them with pandas."""
    directory, history = run
    path = tmp_path / "run.csv"
    exported(capsys, directory, "--csv", path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    sums: dict[tuple[int, str], int] = defaultdict(int)
    for row in rows:
        sums[int(row["step"]), row["moment"]] += int(row["bytes"])
        assert (row["run"], row["rank"], row["device"]) == ("llama", "0", "cpu")
    assert sums == {(r.step, moment.value): b.total_bytes for r in history for moment, b in r.moments.items()}
    table = {column: {row[column] for row in rows} for column in COLUMNS}
    assert table["traced"] | table["estimated"] <= {"0", "1"}
    assert all(float(second) > 0 for second in table["unix_seconds"])


def test_a_place_that_cannot_be_written_is_said(
    run: tuple[Path, tuple[StepRecord, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the reason, one line; one form a call."""
    assert main(["export", str(run[0]), "--csv", str(tmp_path / "gone" / "x.csv")]) == 2
    assert "x.csv cannot be written: No such file" in capsys.readouterr().err
    assert main(["export", str(run[0]), "--csv", "-", "--profiler", "x.json"]) == 2
    assert "--profiler belongs to --perfetto" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run[0])])
    with pytest.raises(SystemExit):
        main(["export", str(run[0]), "--csv", "-", "--perfetto", "-"])

"""A snapshot and a memtrace run of the same process: what the run has recorded says what blocks are for."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forensics.test_by_size import recorded_run

from memtrace.attribution.timeline import Lifetime
from memtrace.cli import main
from memtrace.errors import ConfigError
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from memtrace.forensics.attribution.joined import attribute
from memtrace.forensics.history import read_history
from memtrace.forensics.loader import load_snapshot
from memtrace.forensics.reading import read_snapshot
from memtrace.forensics.recorded_run import RunRecords, find_run
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.readings.snapshot_reading import DeviceReading, ReadBreakdown, ReadKey, SnapshotMoment, Source
from tests.forensics.simulated import BEGIN_US, Recorded, failing, snapshot_of, with_times, write_step_log


@pytest.fixture(scope="module")
def gpt2() -> Recorded:
    return recorded_run("gpt2", "hf-autocast")


def reading(directory: Path, content: dict[str, Any], *records: StepRecord) -> DeviceReading:
    path = directory / "snapshot.pickle"
    path.write_bytes(pickle.dumps(content, protocol=4))
    runs = [RunRecords(name="steps-rank0.jsonl", records=records)]
    return read_snapshot(load_snapshot(path), "s", None, runs).devices[0]


def of_the_run(breakdown: ReadBreakdown) -> dict[EntryKey, int]:
    return {EntryKey(*key[:3]): nbytes for key, nbytes in breakdown.entries.items() if key.source is Source.RUN}


@pytest.mark.parametrize(
    "case",
    [
        ("gpt2", "hf-autocast", "adamw", 1),
        ("llama", "bf16-master", "adamw", 2),
        ("bert", "fp32", "adamw8bit", 2),
        pytest.param(("qwen3", "pure-bf16", "adamw8bit", 2), marks=pytest.mark.long),
        pytest.param(("t5", "hf-autocast", "adamw", 4), marks=pytest.mark.long),
    ],
)
def test_after_a_step_of_the_run_each_block_that_goes_on_is_told_to_the_byte(tmp_path, gpt2, case):
    """No configuration is given: where the next step fails, all entries of the step before are there, and the rest."""
    recorded = gpt2 if case[0] == "gpt2" else recorded_run(*case)
    record = write_step_log(recorded.run, tmp_path)
    device = reading(tmp_path, failing(with_times(recorded.snapshot)), record)
    failure = device.moments[SnapshotMoment.FAILURE]
    assert of_the_run(failure) == record.moments[Moment.STEP_END].entries
    assert failure.total_bytes == record.moments[Moment.STEP_END].total_bytes + 5000
    assert device.notes == ["steps-rank0.jsonl is of the same process: step 2 is in the history."]


def test_at_the_peak_of_a_traced_step_the_table_is_that_of_the_run(tmp_path, gpt2):
    """Activations and temporaries with their element types among it, which nothing in a snapshot tells."""
    record = write_step_log(gpt2.run, tmp_path)
    device = reading(tmp_path, with_times(gpt2.snapshot), record)
    for moment, known in ((SnapshotMoment.PEAK, Moment.PEAK), (SnapshotMoment.END, Moment.STEP_END)):
        assert of_the_run(device.moments[moment]) == record.moments[known].entries
        assert {key.source for key in device.moments[moment].entries} == {Source.RUN}


def test_a_counted_step_tells_what_goes_on_and_nothing_of_its_peak(tmp_path, gpt2):
    """Its peak is an estimate, and what the allocator kept beside the ledger's is told by its size alone."""
    moments = {
        moment: replace(breakdown, estimated=True)
        for moment, breakdown in gpt2.run.moments.items()
        if moment is not Moment.BACKWARD_END
    }
    record = write_step_log(gpt2.run, tmp_path, traced=False, moments=moments)
    device = reading(tmp_path, failing(with_times(gpt2.snapshot)), record)
    assert of_the_run(device.moments[SnapshotMoment.FAILURE]) == moments[Moment.STEP_END].entries
    peak = device.moments[SnapshotMoment.PEAK].entries
    assert peak[ReadKey(Category.WEIGHTS, "trainable", "float32", Source.RUN)] > 0
    assert Source.LIFE in {key.source for key in peak}


def test_a_ring_that_lost_the_beginning_is_matched_with_the_run(tmp_path, gpt2):
    """Blocks from before it have no order; sizes of gradients tell the copies of the model all the same."""
    record = write_step_log(gpt2.run, tmp_path)
    device = reading(tmp_path, failing(with_times(snapshot_of(gpt2.run, 700))), record)
    found = of_the_run(device.moments[SnapshotMoment.FAILURE])
    known = record.moments[Moment.STEP_END].entries
    for key, nbytes in known.items():
        assert key.category is Category.WORKSPACES or found[key] == nbytes


def test_the_clock_of_a_history_may_be_off(tmp_path, gpt2):
    """By a tenth of this step here: the bytes in use say where it has ended. A second is too far."""
    record = write_step_log(gpt2.run, tmp_path)
    content = failing(with_times(gpt2.snapshot))
    for seconds in (-0.0001, 0.0001):
        shifted = replace(record, unix_seconds=record.unix_seconds + seconds)
        failure = reading(tmp_path, content, shifted).moments[SnapshotMoment.FAILURE]
        assert of_the_run(failure) == record.moments[Moment.STEP_END].entries
    for seconds in (-1, 1):
        with pytest.raises(ConfigError, match="another process"):
            reading(tmp_path, content, replace(record, unix_seconds=record.unix_seconds + seconds))


def test_a_run_of_another_process_is_refused_with_the_reason(tmp_path, gpt2):
    """By its times, by what it had in use, by its device; and a snapshot that has no times."""
    record = write_step_log(gpt2.run, tmp_path)
    content = failing(with_times(gpt2.snapshot))
    end = record.moments[Moment.STEP_END]
    larger = {**record.moments, Moment.STEP_END: replace(end, allocated_bytes=(end.allocated_bytes or 0) + 512)}
    for changed, said in (
        (replace(record, unix_seconds=record.unix_seconds - 86_400), r"steps-rank0\.jsonl has steps from 2026-"),
        (replace(record, moments=larger), r"when step 2 ended, it had .* in use .* and the history has"),
        (replace(record, device="cuda:1"), r"steps-rank0\.jsonl is of 'cuda:1'"),
    ):
        with pytest.raises(ConfigError, match=f"of another process than the snapshot.*{said}"):
            reading(tmp_path, content, changed)
    with pytest.raises(ConfigError, match="has no history with times"):
        reading(tmp_path, {**content, "device_traces": []}, record)
    with pytest.raises(ConfigError, match=r"steps-rank0\.jsonl has no steps"):
        reading(tmp_path, content)
    path = tmp_path / "snapshot.pickle"
    ranks = [RunRecords(name=f"rank {rank}", records=[replace(record, device="\x1b[2J")]) for rank in range(64)]
    with pytest.raises(ConfigError) as raised:
        read_snapshot(load_snapshot(path), "s", None, ranks)
    assert str(raised.value).endswith(r"rank 3 is of '\x1b[2J'; and 60 others")


def ended(record: StepRecord, unix_seconds: float, nbytes: int) -> StepRecord:
    """A step with these bytes in use at its end."""
    end = replace(record.moments[Moment.STEP_END], allocated_bytes=nbytes)
    return replace(record, unix_seconds=unix_seconds, moments={Moment.STEP_END: end})


def test_totals_in_another_order_are_those_of_another_process(tmp_path, gpt2):
    """Of a first step what the history has at its end, and of others what it had at its begin; and one step twice."""
    record = write_step_log(gpt2.run, tmp_path)
    content = failing(with_times(gpt2.snapshot))
    begin = content["device_traces"][0][0]["time_us"] / 1e6
    last = record.moments[Moment.STEP_END].total_bytes + 5000
    first = next(entry["size"] for entry in content["device_traces"][0] if entry["action"] == "alloc")
    steps = [ended(record, begin, last), *(ended(record, begin, first) for _ in range(3))]
    with pytest.raises(ConfigError, match="but not in their order"):
        reading(tmp_path, content, *steps)
    (note,) = reading(tmp_path, content, record, record).notes
    assert note.endswith("step 2 is in the history.")


def test_a_step_log_may_say_any_number(tmp_path, gpt2):
    """It is a file that somebody may have written by hand."""
    record = write_step_log(gpt2.run, tmp_path)
    content = failing(with_times(gpt2.snapshot))
    for wrong, said in ((1e300, r"1e\+300 s"), (-1e300, r"-1e\+300 s")):
        with pytest.raises(ConfigError, match=said):
            reading(tmp_path, content, replace(record, unix_seconds=wrong))
    with pytest.raises(ConfigError, match="another process"):
        reading(tmp_path, content, replace(record, step_seconds=-1e300))
    failure = reading(tmp_path, content, replace(record, step_seconds=1e300)).moments[SnapshotMoment.FAILURE]
    assert of_the_run(failure)[EntryKey(Category.WEIGHTS, "trainable", "float32")] > 0


def test_the_command_takes_a_run_directory_and_refuses_that_of_another_run(tmp_path, gpt2, capsys):
    """Of the ranks' logs the one that fits counts; the annotated snapshot has what the run has told."""
    run, other = tmp_path / "run", tmp_path / "other"
    for directory in (run, other):
        directory.mkdir()
    record = write_step_log(gpt2.run, run)
    with StepLog(step_log_path(run, 1)) as log:
        log.write(replace(record, rank=1, device="cuda:1"))
    write_step_log(gpt2.run, other, unix_seconds=record.unix_seconds + 3600)
    snapshot, annotated = str(tmp_path / "s.pickle"), tmp_path / "annotated.pickle"
    Path(snapshot).write_bytes(pickle.dumps(failing(with_times(gpt2.snapshot)), protocol=4))
    assert main(["read", snapshot, "--run", str(run), "--annotate", str(annotated)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"weights trainable float32 run 6\.60 6\.60 6\.60", shown)
    assert "note: steps-rank0.jsonl is of the same process: step 2 is in the history." in shown
    found = read_snapshot(load_snapshot(annotated), "s").devices[0].moments[SnapshotMoment.FAILURE]
    assert found.entries[ReadKey(Category.WEIGHTS, "trainable", "float32", Source.ANNOTATION)] == 6_925_056
    assert main(["read", snapshot, "--run", str(other)]) == 2
    error = capsys.readouterr().err
    assert "s.pickle: the run is of another process than the snapshot" in error


def test_a_run_without_a_step_is_refused_before_the_snapshot_is_read(tmp_path, capsys):
    """Reading it takes minutes: also where the run is not there, or is something else."""
    log = tmp_path / "steps-rank0.jsonl"
    log.write_text('{"schema": "memtrace.st')
    other = tmp_path / "model.bin"
    other.write_bytes(b"\x80\n\x02\n")
    for run, said in (
        (tmp_path, "has no finished step: give the directory or the step log of a run that has one"),
        (tmp_path / "absent", "there is no such step log"),
        (other, "must be a step log"),
    ):
        assert main(["read", str(tmp_path / "never read"), "--run", str(run)]) == 2
        assert said in capsys.readouterr().err


class Looked:
    """A lifetime that counts how often its begin is looked at."""

    looks = 0

    def __init__(self, life: Lifetime) -> None:
        self._life = life

    @property
    def begin(self) -> int:
        Looked.looks += 1
        return self._life.begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._life, name)


def looks(directory: Path, record: StepRecord, steps: int, *, with_run: bool) -> int:
    """How often any begin is looked at while a history of many short steps is attributed; odd ones have two humps."""
    trace: list[dict[str, Any]] = []
    records: list[StepRecord] = []
    address, gradients = 0, []

    def note(action: str, at: int) -> None:
        entry = {"action": action, "addr": at << 21, "size": 4096, "stream": 0}
        trace.append({**entry, "time_us": BEGIN_US + 10_000 * len(trace)})

    def made(count: int) -> list[int]:
        nonlocal address
        address += count
        found = [*range(address - count, address)]
        for at in found:
            note("alloc", at)
        return found

    weights = made(4)
    for step in range(steps):
        for gradient in gradients:
            note("free_completed", gradient)
        gradients = []
        for micro_batch in range(1 + step % 2):
            activations = made(12)
            if not micro_batch:
                gradients = made(4)
            for activation in activations:
                note("free_completed", activation)
        end = trace[-1]["time_us"] / 1e6 + 0.001
        records.append(replace(ended(record, end, 8 * 4096), step=step + 1, step_seconds=0.2))
    path = directory / "snapshot.pickle"
    live = [{"address": at << 21, "size": 4096, "requested_size": 4096} for at in weights + gradients]
    blocks = [{**block, "state": "active_allocated"} for block in live]
    segment = {"device": 0, "address": 0, "total_size": (address + 1) << 21, "stream": 0, "blocks": blocks}
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [trace]}, protocol=4))
    snapshot = load_snapshot(path)
    history = read_history(snapshot, 0)
    run = find_run(history, [RunRecords(name="log", records=records)]) if with_run else None
    assert run is None or len(run.steps) == steps
    lifetimes: Any = [Looked(life) for life in history.timeline.lifetimes]
    Looked.looks = 0
    attribute(replace(history, timeline=replace(history.timeline, lifetimes=lifetimes)), snapshot.stacks, None, run)
    return Looked.looks


@pytest.mark.parametrize("with_run", [False, True])
def test_four_times_the_steps_are_four_times_the_work(tmp_path, gpt2, with_run):
    """A history of a million changes has thousands of short steps: none may be looked at once for each other."""
    record = write_step_log(gpt2.run, tmp_path)
    few, many = (looks(tmp_path, record, steps, with_run=with_run) for steps in (40, 160))
    assert 3 * few < many < 5 * few

"""What real trackers have of a run, read back from what they wrote: TensorBoard, W&B offline, MLflow, Trackio."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtrace.exporters.run_directory.run_history import observe
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.trackers.figures import FORECAST, HEADROOM, PEAK, RISK, part_key
from memtrace.record.categories import Category, Moment
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.record.units import GIB

# The packages take most of a minute to import and to start.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("trackers")]

LIMITS = {"trainer": 64 * GIB, "lightning": 1, "loop": 64 * GIB}
"""The capacity of each run's device, in bytes: a Trainer within it, a Lightning Trainer far over it."""

Series = dict[str, dict[int, float]]
"""Values of each key, by step."""

RUN = """
import os, sys
from pathlib import Path
sys.path[:0] = [{adapters!r}, {tests!r}]
from test_hf_trainer import make_trainer
from memtrace import MemTraceCallback
settings = {{"trace_every": 1, "port": None, "strict": True, "quiet": True}}
callback = MemTraceCallback(log_dir="trainer", device_limit_bytes={limits[trainer]}, **settings)
names = ["tensorboard", "wandb", "mlflow", "trackio"]
os.environ["TENSORBOARD_LOGGING_DIR"] = "board"
trainer = make_trainer(Path(), callback, report_to=names, project="fine-tune", disable_tqdm=True)
trainer.train()
import wandb
wandb.finish()

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from test_lightning import QUIET, Regression, loader
from memtrace import MemTraceLightningCallback
callback = MemTraceLightningCallback(log_dir="lightning", device_limit_bytes={limits[lightning]}, **settings)
loggers = [
    TensorBoardLogger(".", name="pl-board", version=""),
    WandbLogger(save_dir="pl-wandb", project="fine-tune"),
    MLFlowLogger(experiment_name="lightning", tracking_uri=os.environ["MLFLOW_TRACKING_URI"]),
    CSVLogger(".", name="pl-csv", version=""),
]
trainer = pl.Trainer(max_epochs=1, log_every_n_steps=2, callbacks=[callback], **QUIET | {{"logger": loggers}})
trainer.fit(Regression(), loader())
wandb.finish()

import torch
from accelerate import Accelerator
from small_training import batch, make
from torch.nn import functional as F
from memtrace import MemoryTracer
accelerator = Accelerator(log_with=["tensorboard", "mlflow"], project_dir="accelerate", cpu=True)
accelerator.init_trackers("accelerate")
model, optimizer = make()
model, optimizer = accelerator.prepare(model, optimizer)
with MemoryTracer(model, optimizer, log_dir="loop", device_limit_bytes={limits[loop]}, **settings) as tracer:
    for step in range(1, 7):
        inputs, labels = batch()
        loss = F.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            accelerator.log({{"loss": loss.item(), **tracer.figures()}}, step=step)
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a Trainer, a Lightning Trainer and a loop under Accelerate have each reported a run."""
    directory = tmp_path_factory.mktemp("trackers")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"file:{directory / 'mlflow'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(directory / "trackio"),
    }
    script = RUN.format(adapters=str(here), tests=str(here.parent), limits=LIMITS)
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, check=False, cwd=directory, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "memtrace has met a fault" not in ended.stderr
    assert "has failed" not in ended.stderr
    return directory


def board(directory: Path) -> tuple[Series, dict[str, str]]:
    """Returns scalars and texts of the event files below a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    series: Series = {}
    texts: dict[str, str] = {}
    for file in directory.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for key in events.Tags()["scalars"]:
            series[key] = {event.step: event.value for event in events.Scalars(key)}
        for key in events.Tags()["tensors"]:
            texts[key] = events.Tensors(key)[0].tensor_proto.string_val[0].decode()
    return series, texts


def bees(directory: Path, step_key: str) -> tuple[Series, list[str], list[str]]:
    """Returns what an offline run of W&B has: numbers by the step that it counts, files it keeps, artifacts."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.rglob("*.wandb")
    series: Series = {}
    artifacts = []
    for data in whole_records(file.read_bytes()[7:]):  # after the format's own mark
        record = Record()
        record.ParseFromString(data)
        if record.HasField("artifact"):
            artifacts += [entry.path for entry in record.artifact.manifest.contents]
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            if "memtrace" in key and step_key in row and isinstance(value, (int, float)):
                series.setdefault(key, {})[row[step_key]] = value
    return series, [path.name for path in file.parent.rglob("memtrace/*")], artifacts


def whole_records(file: bytes) -> Iterator[bytes]:
    """Yields the records of a log as LevelDB writes it: in blocks of 32 KiB, into which a record may not fit whole."""
    at, whole = 0, b""
    while at + 7 <= len(file):
        if 32768 - (at + 7) % 32768 < 7:  # the rest of a block has no room for a head
            at += 32768 - (at + 7) % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", file, at)
        whole += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its end
            yield whole
            whole = b""


def mlflow(directory: Path, experiment: str) -> tuple[Series, dict[str, str]]:
    """Returns metrics and artifacts of the newest run of an experiment in MLflow's file store."""
    (home,) = [meta.parent for meta in directory.glob("*/meta.yaml") if f"name: {experiment}\n" in meta.read_text()]
    (run,) = [meta.parent for meta in home.glob("*/meta.yaml")]
    series: Series = {}
    for file in (run / "metrics").rglob("*"):
        if file.is_file():
            rows = [line.split() for line in file.read_text().splitlines()]
            series[file.relative_to(run / "metrics").as_posix()] = {int(row[2]): float(row[1]) for row in rows}
    files = {path.name: path.read_text() for path in (run / "artifacts").rglob("*") if path.is_file()}
    return series, files


def trackio(directory: Path) -> tuple[Series, str, int]:
    """Returns numbers, the table, and the count of artifacts of the run in Trackio's database."""
    series: Series = {}
    table = ""
    with sqlite3.connect(directory / "fine-tune.db") as database:
        for (text,) in database.execute("select metrics from metrics"):
            row = json.loads(text)
            for key, value in row.items():
                if "memtrace" in key and isinstance(value, (int, float)):
                    series.setdefault(key, {})[row["train/global_step"]] = value
            table = row.get("memtrace/table", {}).get("_value", table)
    database.close()
    return series, table, len([*(directory / "artifacts").rglob("blobs/*/*/*")])


def expected(log: Path, every: int, last: int, *, at: int = 0) -> Series:
    """Returns what a log of steps makes of so many steps each, by the step at which it is reported."""
    records, limit = [*read_step_log(log / "steps-rank0.jsonl")], LIMITS[log.name]
    keys = {figure.key for figure in (PEAK, HEADROOM, FORECAST, RISK)}
    series: Series = {key: {} for key in (*keys, part_key(Category.WEIGHTS), part_key(Category.UNATTRIBUTED))}
    for step in range(every, last + 1, every):
        peaks = [record.moments[Moment.PEAK] for record in records[step - every : step]]
        highest = max(peaks, key=lambda peak: peak.held_bytes)
        series[PEAK.key][step + at] = highest.held_bytes / GIB
        for category in (Category.WEIGHTS, Category.UNATTRIBUTED):
            series[part_key(category)][step + at] = highest[category] / GIB
        seen = observe(records[:step], limit_bytes=limit)
        snapshot = Snapshot(identity=RunIdentity(run_name=""), latest=records[step - 1], limit_bytes=limit)
        assert seen is not None and snapshot.headroom_bytes is not None
        series[HEADROOM.key][step + at] = snapshot.headroom_bytes / GIB
        if (risk := seen.last.risk).peak is not None:
            series[FORECAST.key][step + at] = risk.peak.predicted_bytes / GIB
        if risk.oom_risk_ratio is not None:
            series[RISK.key][step + at] = risk.oom_risk_ratio
    return series


def check(found: Series, right: Series, *, group: str = "", digits: float = 1e-12) -> None:
    """Checks the values of a tracker, all of them at the steps of its logs."""
    for key, values in right.items():
        assert found.get(group + key, {}) == pytest.approx(values, rel=digits, abs=1e-12), key


def is_table(text: str) -> bool:
    return "sizes in MiB" in text and "unattributed" in text


def test_trainer_reports_to_all(runs: Path) -> None:
    """Each has the figures of steps 2, 4 and 6, equal to the step log, and keeps the table; three keep the report."""
    right = expected(runs / "trainer", 2, 6)
    assert [*right[FORECAST.key]] == [*right[RISK.key]] == [2, 4, 6]
    numbers, texts = board(runs / "board")
    check(numbers, right, group="train/", digits=1e-6)  # an event has 32 bits
    assert is_table(texts["memtrace/table/text_summary"])

    numbers, files, artifacts = bees(runs / "wandb", "train/global_step")
    check(numbers, right, group="train/")
    assert [name for name in files if name.startswith("table")]
    assert sorted(artifacts) == ["report.html", "table.txt"]

    numbers, kept = mlflow(runs / "mlflow", "Default")
    check(numbers, right)
    assert is_table(kept["table.txt"])
    assert "What the peak is made of" in kept["report.html"]

    numbers, table, count = trackio(runs / "trackio")
    check(numbers, right, group="train/")
    assert is_table(table)
    assert count == 2


def test_lightning_reports_to_all(runs: Path) -> None:
    """The same for Lightning's loggers, at the steps in which Lightning logs, which it counts from 0."""
    right = expected(runs / "lightning", 2, 8, at=-1)
    numbers, texts = board(runs / "pl-board")
    check(numbers, right, digits=1e-6)
    assert is_table(texts["memtrace/table/text_summary"])

    numbers, _, artifacts = bees(runs / "pl-wandb", "trainer/global_step")
    check(numbers, right)
    assert sorted(artifacts) == ["report.html", "table.txt"]

    numbers, kept = mlflow(runs / "mlflow", "lightning")
    check(numbers, right)
    assert sorted(kept) == ["report.html", "table.txt"]

    rows = (runs / "pl-csv" / "metrics.csv").read_text().splitlines()
    assert PEAK.key in rows[0]
    assert len(rows) == 1 + 4


def test_accelerate_logs_what_the_tracer_returns(runs: Path) -> None:
    """`accelerator.log({..., **tracer.figures()})` in every third step has the peaks of three steps each."""
    right = expected(runs / "loop", 3, 6)
    numbers, _ = board(runs / "accelerate")
    check(numbers, right, digits=1e-6)
    numbers, _ = mlflow(runs / "mlflow", "accelerate")
    check(numbers, right)

"""Figures in Trainer's logs: the reporting integrations read them, and nobody else does."""

from __future__ import annotations

import copy
import logging
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_hf_trainer import make_trainer
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from memtrace import MemTraceCallback, Moment
from memtrace.adapters.trackers import KEY
from memtrace.exporters.run_directory.run_history import observe
from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.trackers.figures import CATALOGUE, FORECAST, HEADROOM, PEAK, RISK, part_key
from memtrace.record.categories import Category
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.record.units import GIB

LIMIT = 64 * GIB
SETTINGS: dict[str, Any] = {"port": None, "strict": True, "trace_every": 1, "device_limit_bytes": LIMIT, "quiet": True}


class Writer:
    """A SummaryWriter that keeps the texts; can fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.texts: dict[str, str] = {}
        self._error = error

    def add_text(self, key: str, text: str) -> None:
        if self._error is not None:
            raise self._error
        self.texts[key] = text

    def flush(self) -> None:
        pass


class Reads:
    """Keeps the logs, by step."""

    def __init__(self, writer: Writer | None = None) -> None:
        self.logs: list[tuple[int, dict[str, Any]]] = []
        self.tb_writer = writer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.tb_writer = None


class Board(Reads, TensorBoardCallback):
    """A reporting integration."""


class Bees(Reads, WandbCallback):
    """Another one."""


class User(Reads, TrainerCallback):
    """What a user writes."""


class Fails(TrainerCallback):
    """Ends a training after its third step, once."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and not hasattr(self, "failed"):
            self.failed = True
            raise RuntimeError("out of data")


class Copies(TrainerCallback):
    """Copies and pickles the Trainer's callbacks in the midst of training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not hasattr(self, "copies"):
            places = [
                one
                for one in self.trainer.callback_handler.callbacks
                if type(one).__module__.startswith("memtrace.adapters.trainer_logs")
            ]
            self.copies = [copy.deepcopy(places), copy.copy(places[0]), pickle.loads(pickle.dumps(places))]


def ours(logs: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if key.startswith("memtrace/")}


def expected(directory: Path, after: int, until: int) -> dict[str, float]:
    """Returns the figures of some steps, made from the step log."""
    records = [record for record in read_step_log(directory / "steps-rank0.jsonl") if record.step <= until]
    found = observe(records, limit_bytes=LIMIT)
    assert found is not None and found.last.risk.peak is not None
    snapshot = Snapshot(identity=RunIdentity(run_name=""), latest=records[-1], limit_bytes=LIMIT)
    peak = max(
        (record.moments[Moment.PEAK] for record in records if record.step > after), key=lambda peak: peak.held_bytes
    )
    return {
        PEAK.key: peak.held_bytes / GIB,
        HEADROOM.key: (snapshot.headroom_bytes or 0) / GIB,
        FORECAST.key: found.last.risk.peak.predicted_bytes / GIB,
        RISK.key: found.last.risk.oom_risk_ratio or 0.0,
        **{part_key(category): peak[category] / GIB for category in (Category.WEIGHTS, Category.UNATTRIBUTED)},
    }


def test_integrations_alone_read_the_figures(tmp_path: Path) -> None:
    """They are those of the step log at the steps of the logs; all else has the logs of a run without memtrace."""
    writer = Writer()
    early, board, between, bees = User(), Board(writer), User(), Bees()
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, early, board, between, bees, MemTraceCallback(**SETTINGS), User(), **arguments)
    late = trainer.callback_handler.callbacks[-2]
    before = list(trainer.callback_handler.callbacks)
    output = trainer.train()

    assert trainer.callback_handler.callbacks == before
    trained = [(step, logs) for step, logs in board.logs if "loss" in logs]
    assert [step for step, _ in trained] == [2, 4, 6]
    for step, logs in trained:
        figures = ours(logs)
        right = expected(tmp_path / "out" / "memtrace", step - 2, step)
        assert {key: figures[key] for key in right} == right
        assert {type(value) for value in figures.values()} == {float}
        whole = sum(size for key, size in figures.items() if key.startswith("memtrace/peak/"))
        assert whole == pytest.approx(figures[PEAK.key], rel=0.05), "what is below the share of a figure is left out"
    assert [ours(logs) for _, logs in bees.logs] == [ours(logs) for _, logs in board.logs]
    assert not any(ours(logs) for _, logs in board.logs if "loss" not in logs), (
        "evaluations and totals are as they were"
    )

    for reader in (early, between, late):
        assert [step for step, _ in reader.logs] == [step for step, _ in board.logs]
        assert not any(ours(logs) for _, logs in reader.logs)
    assert not any(ours(row) for row in [*trainer.state.log_history, output.metrics, trainer.evaluate()])
    assert "unattributed" in writer.texts[KEY], "the table came before the writer was closed"
    known = {figure.key for figure in CATALOGUE} | {part_key(category) for category in Category}
    assert {key for _, logs in board.logs for key in ours(logs)} <= known


@pytest.mark.parametrize("case", ["off", "nobody reads"])
def test_without_figures_the_list_of_callbacks_is_left_alone(tmp_path: Path, case: str) -> None:
    """Off by one setting, and without an integration there is nothing to do."""
    board = Board() if case == "off" else User()

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seen = list(trainer.callback_handler.callbacks)

    looks = Looks()
    trainer = make_trainer(tmp_path, board, MemTraceCallback(**SETTINGS, trackers=case != "off"), looks)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert looks.seen == before
    assert not any(ours(logs) for _, logs in board.logs)


def test_callbacks_that_are_added_at_the_begin(tmp_path: Path) -> None:
    """They are told of it, as without memtrace, and an integration among them gets figures."""

    class Late(Board):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.told = True

    late = Late()

    class Adds(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trainer.add_callback(late)

    trainer = make_trainer(tmp_path, Board(), MemTraceCallback(**SETTINGS), Adds())
    trainer.train()
    assert late.told
    assert [step for step, logs in late.logs if PEAK.key in logs] == [2, 4, 6]
    assert trainer.callback_handler.callbacks[-1] is late


def test_a_training_that_failed_leaves_no_place_twice(tmp_path: Path) -> None:
    """The next training begins anew: each figure once, and the list as it was at the end."""
    board, fails = Board(), Fails()
    trainer = make_trainer(tmp_path, board, MemTraceCallback(**SETTINGS), fails)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match="out of data"):
        trainer.train()
    assert len(trainer.callback_handler.callbacks) == len(before) + 2
    trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert [step for step, logs in board.logs if PEAK.key in logs] == [2, 2, 4, 6]


def test_a_tracker_that_fails_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a tracker raises when it is given the table is logged; the training has ended as without memtrace."""
    board = Board(Writer(ConnectionError("no route")))
    trainer = make_trainer(tmp_path, board, MemTraceCallback(**SETTINGS))
    with caplog.at_level(logging.ERROR, "memtrace"):
        assert trainer.train().global_step == 6
    assert [record.message for record in caplog.records] == [
        "memtrace: handing the table of the run to a tracker has failed; training goes on, and this is not said again"
    ]
    assert "no route" in caplog.text


def test_a_callback_in_front_of_all(tmp_path: Path) -> None:
    """As one of Trainer's default callbacks comes: figures and table arrive all the same."""
    writer = Writer()
    board = Board(writer)
    trainer = make_trainer(tmp_path, board)
    trainer.callback_handler.callbacks.insert(0, MemTraceCallback(**SETTINGS))
    trainer.train()
    assert [step for step, logs in board.logs if PEAK.key in logs] == [2, 4, 6]
    assert "unattributed" in writer.texts[KEY]


def test_without_a_place_for_files_there_is_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine without a temporary directory that can be written costs the table, and is no fault."""
    writer = Writer()
    trainer = make_trainer(tmp_path, Board(writer), MemTraceCallback(**SETTINGS))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert trainer.train().global_step == 6
    assert writer.texts == {}
    (told,) = [record.message for record in caplog.records if "trackers" in record.message]
    assert told.startswith("memtrace: trackers get no table of the run, its files cannot be written: ")


def test_copies_of_a_place_do_nothing(tmp_path: Path) -> None:
    """Whoever copies or pickles a Trainer in training gets plain callbacks in their places, and no model."""
    copies = Copies()
    trainer = make_trainer(tmp_path, Board(), copies, MemTraceCallback(**SETTINGS))
    copies.trainer = trainer
    trainer.train()
    deep, shallow, pickled = copies.copies
    assert {type(one) for one in (*deep, shallow, *pickled)} == {TrainerCallback}


def test_a_callback_inside_another_says_that_trackers_get_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that the Trainer does not know finds no Trainer: that is said once, where there is a tracker."""
    inner = MemTraceCallback(**SETTINGS)

    class Wraps(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            inner.on_train_begin(*arguments, **named)

        def on_train_end(self, *arguments: Any, **named: Any) -> None:
            inner.on_train_end(*arguments, **named)

    trainer = make_trainer(tmp_path, Wraps())
    trainer.args.report_to = ["wandb", "tensorboard"]
    trainer.train()
    told = [record.message for record in caplog.records if "no figures go to" in record.message]
    assert told == ["memtrace: no figures go to wandb, tensorboard: no Trainer was found"]

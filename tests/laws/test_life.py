"""Law 8: what a run without memtrace would have let go is let go at the same moment with it."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from laws.families import POSITIONS, Family
from laws.life import LIVES, Run, Story, play
from laws.surroundings import unchanged
from laws.ways import WAYS, Way, every_step
from nothing_left import memtrace_threads, recorders_of_torch
from torch import nn

from memtrace.adapters.hf_trainer import MemTraceCallback
from memtrace.config import TracerConfig
from memtrace.sources import autograd_torch_private
from memtrace.sources.devices.sampler import _ThreadRun
from memtrace.tracing.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}
CONFIGS = {
    "traced": TracerConfig(**QUIET, trace_every=1),
    "counted": TracerConfig(**QUIET, trace_every=0),
    "default": TracerConfig(**QUIET),
}
TABLE = [
    (way, family, settings)
    for way in WAYS
    for family in way.families
    for settings in CONFIGS
    if settings != "default" or family is LIVES[0]
]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Loads what the first step of each model loads, and takes it out of garbage collection: 1 ms instead of 200."""
    for family in LIVES:
        play(every_step, Run(family, partial(Tracer, config=CONFIGS["traced"])))
    gc.collect()
    gc.freeze()


@cache
def bare_story(way: str, family: str) -> Story:
    """What happens without memtrace decides what is right."""
    played, model = next((w, f) for w, f, _ in TABLE if (w.name, f.name) == (way, family))
    return play(played.play, Run(model))


@pytest.mark.parametrize(
    ("way", "family", "settings"), [pytest.param(*row, id=f"{row[0]}-{row[1].name}-{row[2]}") for row in TABLE]
)
def test_nothing_is_kept_hidden_or_changed(way: Way, family: Family, settings: str) -> None:
    """The same storages are made, and the same are alive at each moment, collected or not; the same is raised; weights
    and state are the same bits; hooks, threads, files and recorders are as before."""

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tracer:
        return Tracer(model, optimizer, CONFIGS[settings])

    expected, run = bare_story(way.name, family.name), Run(family, watch)
    found = play(way.play, run, around=unchanged)
    assert found.raised == expected.raised
    assert kept_longer(found, expected) == []
    assert found.made == expected.made
    assert all(map(same_bits, found.values, expected.values))


def kept_longer(found: Story, expected: Story) -> list[str]:
    """Where the storages that are alive differ, and the first of those that only one run has."""
    moments = [f"{position}: {moment}" for position, (moment, _) in enumerate(expected.alive)]
    pairs = zip(moments, found.alive, expected.alive, strict=True)
    return [
        f"{moment}: {len(seen)} instead of {len(right)}, such as {sorted({*seen} ^ {*right})[:3]}"
        for moment, (_, seen), (_, right) in pairs
        if seen != right
    ]


@pytest.mark.parametrize("settings", ["traced", "counted"])
@pytest.mark.parametrize("end", ["finished", "in the middle of a step", "interrupted"])
def test_after_detach_a_kept_tracer_keeps_figures(end: str, settings: str) -> None:
    """Model, optimizer, state and the last loss are let go; records and snapshot can be read as before."""
    run = Run(LIVES[0])
    tracer = Tracer(run.model, run.optimizer, CONFIGS[settings])
    with run.storages, run.catching(KeyboardInterrupt), tracer:
        every_step(run)
        if end != "finished":
            run.loss()
        if end == "interrupted":
            raise KeyboardInterrupt
    history, snapshot = tracer.history, tracer.snapshot()
    weak = [weakref.ref(run.model), weakref.ref(run.optimizer), *map(weakref.ref, run.model.parameters())]
    del run.model, run.optimizer
    gc.collect()
    assert run.storages.alive() == ()
    assert [one() for one in weak] == [None] * len(weak)
    assert tracer.history == history
    assert tracer.latest is history[-1]
    assert len(history) == 3
    assert tracer.snapshot().totals == snapshot.totals
    tracer.detach()


@pytest.mark.parametrize("end", ["finished", "in the middle of a step"])
def test_a_dropped_tracer_ends_with_its_model(end: str) -> None:
    """Nobody has called `detach()`: the collector frees model, optimizer and tracer, the sampling thread ends, and no
    recorder stays behind."""

    def cell() -> list[weakref.ref[Any]]:
        run = Run(LIVES[0])
        tracer = Tracer(run.model, run.optimizer, replace(CONFIGS["traced"], device_poll_seconds=0.05))
        tracer.attach()
        every_step(run)
        if end != "finished":
            run.loss()
        return [weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(tracer)]

    threads = threading.active_count()
    weak = cell()
    gc.collect()
    kept, running, recording = weak[-1](), memtrace_threads(), recorders_of_torch()
    end_by_force(kept)
    assert [one() for one in weak] == [None, None, None]
    assert running == []
    assert recording == {}
    assert threading.active_count() == threads


def end_by_force(kept: Tracer | None) -> None:
    """Ends what a dropped tracer should have ended: else no later test has a clean process."""
    if kept is not None:
        kept.detach()
    for sampling in (one for one in gc.get_objects() if type(one) is _ThreadRun):
        sampling.stop()
    if torch.autograd._profiler_enabled():
        torch.autograd._enable_record_function(True)
        torch.autograd._disable_profiler()
    while autograd_torch_private.has_saved_tensor_hooks():
        torch._C._autograd._pop_saved_tensors_default_hooks()


def test_a_callback_kept_after_training_keeps_figures(tmp_path: Path) -> None:
    """Under Trainer the end of training is the end of the watch."""
    callback = MemTraceCallback(strict=True, port=None, log_dir=str(tmp_path / "log"), trace_every=1)
    model = LIVES[2].build()
    sample = {"input_ids": [1] * POSITIONS, "labels": [1] * POSITIONS}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=[sample] * 4, callbacks=[callback])
    trainer.train()
    weak = [weakref.ref(model), weakref.ref(trainer.optimizer.optimizer)]
    trainer.accelerator.free_memory()  # accelerate's own lists
    AcceleratorState._reset_state(reset_partial_state=True)
    del model, trainer
    gc.collect()
    assert [one() for one in weak] == [None, None]
    assert callback.tracer is not None
    assert [record.traced for record in callback.tracer.history] == [True, True]
    assert callback.tracer.snapshot().totals.steps == 2


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))

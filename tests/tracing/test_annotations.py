"""Categories in the history that the user records of the allocator, and back from their snapshot."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeAllocator
from small_training import EVERY_STEP, make

from memtrace.config import TracerConfig
from memtrace.forensics.attribution.joined import attribute_devices
from memtrace.forensics.loader import load_snapshot
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source
from memtrace.sources.cuda.source import CudaEvents
from memtrace.tracing.tracer import Tracer

ANNOTATED = replace(EVERY_STEP, annotate_snapshots=True)


class Training:
    """A model whose gradients and optimizer state are blocks of the allocator."""

    def __init__(self, allocator: FakeAllocator) -> None:
        self.allocator = allocator
        self.model, self.optimizer = make()
        self.step()
        state = self.optimizer.state
        self.blocks: dict[int, tuple[Category, str]] = {}
        for parameter in self.model.parameters():
            self.add(state[parameter]["step"], Category.OPTIMIZER_STATE, "step")
            assert parameter.grad is not None
            self.add(parameter, Category.WEIGHTS, "trainable")
            self.add(parameter.grad, Category.GRADIENTS, "")
            for name in ("exp_avg", "exp_avg_sq"):
                self.add(state[parameter][name], Category.OPTIMIZER_STATE, name)

    def add(self, tensor: torch.Tensor, category: Category, component: str) -> None:
        self.blocks[tensor.data_ptr()] = category, component
        self.allocator.allocate(tensor.data_ptr(), tensor.nbytes)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.model(torch.ones(4, 16)).sum().backward()
        self.optimizer.step()

    def traced(self, config: TracerConfig = ANNOTATED) -> None:
        """One step with a record."""
        with Tracer(self.model, self.optimizer, config, source=CudaEvents(0)) as tracer:
            self.step()
            assert tracer.latest is not None

    def notes(self) -> list[tuple[int, str]]:
        return [(one["addr"], one["user_metadata"]) for one in self.allocator.ring if one["action"] == "annotate"]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(FakeAllocator().install(monkeypatch))


def test_a_snapshot_of_the_users_says_what_each_block_is(training: Training, tmp_path: Path) -> None:
    """With stacks, as torch records by default, where memtrace has no window: every block that lasts, read back."""
    training.allocator.record(context="all")
    training.traced()
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(training.allocator.snapshot()))
    (found,) = attribute_devices(load_snapshot(path), None)
    labels = {life.address: found.label(index) for index, life in enumerate(found.history.timeline.lifetimes)}
    assert {at: (label.category, label.component) for at, label in labels.items()} == training.blocks
    assert {label.source for label in labels.values()} == {Source.ANNOTATION}
    assert {label.dtype for label in labels.values()} == {"float32"}


def test_gradients_that_the_step_drops_are_written_before_the_optimizer_uses_them(training: Training) -> None:
    """They are gone when the step ends; a second optimizer of the step does not write them again."""
    training.allocator.record(context="all")
    frozen = torch.optim.SGD(training.model.head.parameters(), lr=0.0)
    with Tracer(training.model, [training.optimizer, frozen], ANNOTATED, source=CudaEvents(0)):
        training.step()
        frozen.step()
    gradients = [at for at, text in training.notes() if "gradients" in text]
    ours = [at for at, (category, _) in training.blocks.items() if category is Category.GRADIENTS]
    assert sorted(gradients) == sorted([*ours, *ours])


def test_what_autograd_saves_is_written_where_a_step_is_traced(training: Training) -> None:
    """A history without stacks is read: activations are written as they are saved; saved weights stay weights."""
    training.allocator.record(context=None)
    training.traced()
    texts = {text for at, text in training.notes() if at not in training.blocks}
    assert texts == {"memtrace: activations float32"}
    assert {text.split()[1] for at, text in training.notes() if at in training.blocks} == {
        category.value for category, _ in training.blocks.values()
    }


def test_only_the_users_history_is_written_into(training: Training) -> None:
    """Nothing without the setting, nor where nobody records, nor into memtrace's own recording of a traced step."""
    training.traced()
    assert training.allocator.calls.count("record") == 1
    assert training.notes() == []
    training.allocator.record(context="all")
    training.traced(EVERY_STEP)
    assert training.notes() == []


def test_a_torch_that_cannot_is_told_once(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before torch 2.14: one warning, and the training goes on."""
    monkeypatch.delattr(torch._C, "_cuda_annotateMemory")
    training.allocator.record(context="all")
    with Tracer(training.model, training.optimizer, ANNOTATED, source=CudaEvents(0)):
        training.step()
        training.step()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in said if "no snapshot is annotated" in line]) == 1
    assert training.notes() == []

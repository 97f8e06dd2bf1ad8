"""The tracer beside saved-tensor hooks and profilers of the user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import (
    EVERY_STEP,
    FLOAT,
    ROWS,
    WIDTH,
    Net,
    assert_law_1,
    batch,
    loss_of,
    make,
    parameter_bytes,
    step,
    traced,
)
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer


class Recorder:
    """Saved-tensor hooks of a user: they count, and pack into a box so that a lost call would show."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def pack(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        self.packed += 1
        return "packed", tensor * 1

    def unpack(self, box: tuple[str, torch.Tensor]) -> torch.Tensor:
        self.unpacked += 1
        assert box[0] == "packed"
        return box[1]


class TestHooksOfTheUser:
    """Saved-tensor hooks that the user has put on."""

    def run(self, where: str, trace: bool) -> tuple[list[float], int, int]:
        """Three steps with the user's hooks in one place; returns losses and how often the hooks were called."""
        recorder = Recorder()
        hooks: Callable[[], Any] = lambda: saved_tensors_hooks(recorder.pack, recorder.unpack)  # noqa: E731

        class Inside(Net):
            def middle(self, hidden: torch.Tensor) -> torch.Tensor:
                with hooks() if where == "inside" else contextlib.nullcontext():
                    return super().middle(hidden)

        torch.manual_seed(0)
        model = Inside()
        optimizer = torch.optim.AdamW(model.parameters())
        losses = []
        with contextlib.ExitStack() as stack:
            if trace:
                stack.enter_context(traced(model, optimizer))
            if where == "around the loop":
                stack.enter_context(hooks())
            for _ in range(3):
                optimizer.zero_grad()
                rows, labels = batch()
                with hooks() if where == "around the model" else contextlib.nullcontext():
                    logits = model(rows)
                with hooks() if where == "around the loss" else contextlib.nullcontext():
                    loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, recorder.packed, recorder.unpacked

    @pytest.mark.parametrize("where", ["inside", "around the model", "around the loss", "around the loop"])
    def test_are_called_as_without_memtrace(self, where: str) -> None:
        """As often, with the same losses, wherever they were put on."""
        bare, with_tracer = self.run(where, False), self.run(where, True)
        assert with_tracer == bare
        assert bare[1] > 0

    def test_around_one_of_two_micro_batches(self) -> None:
        """Put on and taken off while a traced step goes on: each block takes off its own pair."""
        recorder = Recorder()
        model, optimizer = make()
        with traced(model, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model).backward()
                with saved_tensors_hooks(recorder.pack, recorder.unpack):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        assert recorder.packed == recorder.unpacked > 0

    @pytest.mark.parametrize("where", ["outside", "inside"])
    def test_offloading_to_the_cpu(self, where: str) -> None:
        """torch's own `save_on_cpu`, around the model or in it: same losses."""

        def run(trace: bool) -> list[float]:
            torch.manual_seed(0)
            model = Net()
            if where == "inside":
                middle = model.middle

                def offloaded(hidden: torch.Tensor) -> torch.Tensor:
                    with save_on_cpu():
                        return middle(hidden)

                model.middle = offloaded  # type: ignore[method-assign]
            optimizer = torch.optim.AdamW(model.parameters())
            losses = []
            with contextlib.ExitStack() as stack:
                if trace:
                    stack.enter_context(traced(model, optimizer))
                for _ in range(2):
                    optimizer.zero_grad()
                    with save_on_cpu() if where == "outside" else contextlib.nullcontext():
                        loss = loss_of(model)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
            return losses

        assert run(True) == run(False)

    def test_forbidden_hooks_are_not_put_on(self) -> None:
        """Where the user forbids saved-tensor hooks activations are known by their life alone, and nothing fails."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer, torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            step(model, optimizer)
        forward_end = tracer.history[-1].moments[Moment.FORWARD_END]
        assert forward_end[Category.ACTIVATIONS] > ROWS * WIDTH * FLOAT
        assert forward_end[Category.WEIGHTS] == parameter_bytes(model)


class TestProfilersOfTheUser:
    """torch's profiler cannot nest: the user's comes first."""

    def test_a_profile_around_the_loop(self) -> None:
        """Its data is complete, and no step is traced while it runs; afterwards tracing goes on.

        A window that could not be opened is tried again after one step, then after two.
        """
        model, optimizer = make()
        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step(model, optimizer)
                step(model, optimizer)
            for _ in range(3):
                step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, False, False, True, True]
        assert_law_1(tracer.history)
        counts = {event.key: event.count for event in profiler.key_averages()}
        assert counts["aten::linear"] == 8
        assert counts["Optimizer.step#AdamW.step"] == 2

    @pytest.mark.parametrize("where", ["forward", "loss"])
    def test_a_profile_begun_inside_a_traced_step(self, where: str) -> None:
        """memtrace gives way: the profile has every operator from where it began. (Begun inside a backward pass, a
        profile is empty without memtrace too.)"""
        model, optimizer = make()
        profiler = profile(activities=[ProfilerActivity.CPU])
        begun = []

        def begin(*_: object) -> None:
            if not begun:
                begun.append(True)
                profiler.start()

        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            step(model, optimizer)
            rows, labels = batch()
            handle = model.second.register_forward_pre_hook(begin) if where == "forward" else None
            logits = model(rows)
            if handle is not None:
                handle.remove()
            if where == "loss":
                begin()
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            with record_function("marked by the user"):
                optimizer.step()
            profiler.stop()
            step(model, optimizer)
        names = {event.key for event in profiler.key_averages()}
        assert {"marked by the user", "Optimizer.step#AdamW.step", "aten::mm"} <= names
        if where == "forward":
            assert "aten::linear" in names
        assert [record.traced for record in tracer.history] == [True, False, True]

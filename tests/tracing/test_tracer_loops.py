"""The tracer in the loops that people write: steps, their schedule, exceptions, two tracers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_training import (
    EVERY_STEP,
    FLOAT,
    LARGE,
    ON_DEMAND,
    ROWS,
    WIDTH,
    Net,
    assert_law_1,
    batch,
    empty_at,
    loss_of,
    make,
    parameter_bytes,
    step,
    traced,
)
from torch import nn
from torch.nn import functional as F

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.sources import autograd_torch_private
from memtrace.tracing.tracer import Tracer

AS_BY_DEFAULT = replace(EVERY_STEP, trace_every=None, history=200)


class TestSteps:
    """What counts as one step."""

    def test_accumulation_is_one_step(self) -> None:
        """Several forward and backward passes, one step of the optimizer: one record, with all micro batches."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                for rows in (2, 5, 3):
                    loss_of(model, rows).backward()
                optimizer.step()
        assert [record.step for record in tracer.history] == [1, 2]
        shape = tracer.history[-1].batch
        assert shape is not None
        assert (shape.shape, shape.tokens) == ((5, WIDTH), 10 * WIDTH)
        assert shape.largest_micro_batch_tokens == 5 * WIDTH

    def test_evaluation_between_steps_is_no_step(self) -> None:
        """Forward passes without gradients make no record and leave no hooks on."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                step(model, optimizer)
                with torch.no_grad():
                    model(torch.randn(100, WIDTH))
                with torch.inference_mode():
                    model(torch.randn(100, WIDTH))
        assert [record.batch.tokens for record in tracer.history if record.batch] == [ROWS * WIDTH] * 2
        assert len(tracer.history) == 2

    def test_evaluation_inside_a_step_is_not_its_forward_pass(self) -> None:
        """A look at other data between backward and the optimizer belongs to the step's events, not to its batch."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            loss_of(model).backward()
            with torch.no_grad():
                model(torch.randn(100, WIDTH))
            optimizer.step()
        shape = tracer.history[-1].batch
        assert shape is not None
        assert shape.tokens == ROWS * WIDTH

    def test_several_optimizers_make_one_step(self) -> None:
        """The step ends when the last of them has stepped; each one's state has its components."""
        torch.manual_seed(0)
        model = Net()
        first = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.AdamW([*model.second.parameters(), *model.head.parameters()])
        with traced(model, [first, second]) as tracer:
            for _ in range(2):
                loss_of(model).backward()
                first.step()
                second.step()
                first.zero_grad()
                second.zero_grad()
        assert len(tracer.history) == 2
        parts = {key.component for key in tracer.history[-1].moments[Moment.STEP_END].entries}
        assert parts >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}

    def test_an_optimizer_without_a_forward_pass_of_the_model(self) -> None:
        """A step on gradients that came from elsewhere is a step without a forward pass."""
        model, optimizer = make()
        with Tracer(model, optimizer, ON_DEMAND) as tracer:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert tracer.latest is not None
        assert tracer.latest.batch is None
        assert Moment.FORWARD_END not in tracer.latest.moments

    def test_the_loop_tells_its_steps(self) -> None:
        """With explicit steps, two calls of the optimizer can be one step, and one outside belongs to none."""
        model, optimizer = make()
        with traced(model, optimizer, explicit_steps=True) as tracer:
            tracer.begin_step()
            step(model, optimizer)
            step(model, optimizer)
            tracer.end_step()
            step(model, optimizer)
            tracer.begin_step(7)
            step(model, optimizer)
            tracer.end_step()
        assert [record.step for record in tracer.history] == [1, 7]

    def test_a_step_that_the_loop_ends_without_the_optimizer(self) -> None:
        """A skipped update, with explicit steps: it has its record, and no hook stays on after it."""
        model, optimizer = make()
        with traced(model, optimizer, explicit_steps=True) as tracer:
            tracer.begin_step()
            loss_of(model).backward()
            tracer.end_step()
            assert not autograd_torch_private.has_saved_tensor_hooks()
        moments = tracer.history[-1].moments
        assert set(moments) == set(Moment)
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)

    def test_a_smaller_last_batch(self) -> None:
        """Each record has the shape of its own batch."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for rows in (8, 8, 3):
                step(model, optimizer, rows)
        assert [record.batch.shape for record in tracer.history if record.batch] == [(8, 16), (8, 16), (3, 16)]


class TestSchedule:
    """Which steps are traced."""

    def test_the_first_step_with_state_is_traced(self) -> None:
        """The second one: the first makes the state."""
        model, optimizer = make()
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for _ in range(4):
                step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, True, False, False]

    def test_without_state_it_is_the_second_step_too(self) -> None:
        """Plain SGD never has state."""
        model, optimizer = make(torch.optim.SGD)
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for _ in range(3):
                step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, True, False]

    def test_the_next_step_on_demand(self) -> None:
        """`trace_next()` makes one step a traced one."""
        model, optimizer = make()
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for number in range(1, 6):
                if number == 4:
                    tracer.trace_next()
                step(model, optimizer)
        assert [record.step for record in tracer.history if record.traced] == [2, 4]

    def test_law_1_holds_however_often_and_however_large(self) -> None:
        """Traces far apart, batches that come and go, and addresses that are used again in between."""
        model, optimizer = make()
        every_third = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=3)
        with traced(model, optimizer, every_third) as tracer:
            for number in range(60):
                step(model, optimizer, rows=1 + number * 7 % 13)
        assert sum(record.traced for record in tracer.history) == 20

    def test_law_1_holds_for_a_batch_at_an_address_that_an_earlier_trace_knew(self) -> None:
        """torch's profiler remembers how large the block there was, and reports that size when the batch goes."""

        class WithMask(Net):
            def forward(self, rows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
                return super().forward(rows)

        large, smaller = LARGE + 3000, LARGE + 1000  # as many pages
        torch.manual_seed(0)
        model = WithMask()
        optimizer = torch.optim.AdamW(model.parameters())
        with traced(model, optimizer) as tracer:
            model(batch()[0]).sum().backward()
            seen = torch.empty(large, dtype=torch.uint8)
            address = seen.data_ptr()
            optimizer.step()
            del seen
            mask = empty_at(address, smaller)
            model(batch()[0], mask).sum().backward()
            del mask
            optimizer.step()
        moments = tracer.history[-1].moments
        assert moments[Moment.FORWARD_END][Category.INPUTS] == smaller + ROWS * WIDTH * FLOAT
        assert moments[Moment.STEP_END][Category.INPUTS] == 0
        assert moments[Moment.FORWARD_END][Category.UNATTRIBUTED] < LARGE


class TestExceptions:
    """A step that does not end."""

    @pytest.mark.parametrize("part", ["forward", "loss", "backward", "optimizer"])
    def test_the_loop_goes_on_after_an_exception(self, part: str) -> None:
        """The exception is the caller's; the step that it cut off is finished by the next one."""
        model, optimizer = make()

        def fail(*_: object) -> None:
            raise ArithmeticError("of the user")

        with traced(model, optimizer) as tracer:
            step(model, optimizer)
            with pytest.raises(ArithmeticError, match="of the user"):
                optimizer.zero_grad()
                handle = model.head.register_forward_pre_hook(fail) if part == "forward" else None
                try:
                    loss = loss_of(model)
                finally:
                    if handle is not None:
                        handle.remove()
                if part == "loss":
                    fail()
                if part == "backward":
                    loss.register_hook(fail)
                loss.backward()
                handle = optimizer.register_step_pre_hook(fail)
                try:
                    optimizer.step()
                finally:
                    handle.remove()
            step(model, optimizer)
            step(model, optimizer)
        assert [record.step for record in tracer.history] == [1, 2, 3]
        assert all(record.traced for record in tracer.history)

    def test_a_second_run_in_the_same_process(self) -> None:
        """New model, new optimizer, new tracer, after a run that an exception ended: as the first one."""
        outcomes = []
        for _ in range(2):
            torch.manual_seed(0)
            model, optimizer = make()
            with pytest.raises(ZeroDivisionError), traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
                loss_of(model)
                _ = 1 // 0
            moments = tracer.history[-1].moments
            outcomes.append({moment: dict(breakdown.entries) for moment, breakdown in moments.items()})
        assert outcomes[0] == outcomes[1]

    def test_one_model_traced_again(self) -> None:
        """A second tracer on the same model and optimizer sees what the first one saw."""
        model, optimizer = make()
        seen = []
        for _ in range(2):
            with traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
            seen.append(dict(tracer.history[-1].moments[Moment.STEP_END].entries))
        assert seen[0] == seen[1]


class TestTwoTracers:
    """Two tracers at once."""

    def test_on_two_models(self) -> None:
        """One after the other: each step of both is traced."""
        left, right = make(), make()
        with Tracer(*left, EVERY_STEP) as first, Tracer(*right, EVERY_STEP) as second:
            for _ in range(3):
                step(*left)
                step(*right)
        assert [record.traced for record in (*first.history, *second.history)] == [True] * 6
        assert_law_1(first.history)
        assert_law_1(second.history)

    @pytest.mark.parametrize("critic_steps", [1, 5])
    @pytest.mark.parametrize("config", [EVERY_STEP, AS_BY_DEFAULT], ids=["every step", "default"])
    def test_on_two_models_whose_steps_overlap(self, config: TracerConfig, critic_steps: int) -> None:
        """A generator and a discriminator, which the generator's step calls too: on a CPU only one of them can record
        at a time, and they take turns. With default settings both have a trace within three steps."""
        torch.manual_seed(0)
        generator, discriminator = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        of_generator, of_discriminator = (torch.optim.Adam(net.parameters()) for net in (generator, discriminator))
        with (
            Tracer(generator, of_generator, config) as first,
            Tracer(discriminator, of_discriminator, config) as second,
        ):
            for _ in range(30):
                for _ in range(critic_steps):
                    fake = generator(torch.randn(ROWS, WIDTH))
                    loss = discriminator(fake.detach()).mean() - discriminator(torch.randn(ROWS, WIDTH)).mean()
                    loss.backward()
                    of_discriminator.step()
                    of_discriminator.zero_grad()
                discriminator(fake).mean().backward()
                of_generator.step()
                of_generator.zero_grad()
        for tracer, steps in ((first, 30), (second, 30 * critic_steps)):
            assert tracer.snapshot().totals.steps == steps
            traced_steps = [record.step for record in tracer.history if record.traced]
            assert len(traced_steps) >= 4 if config is EVERY_STEP else traced_steps[0] <= 3
            assert_law_1(tracer.history)
            assert tracer.snapshot().not_seen == ()

    def test_on_one_model(self) -> None:
        """The second one gives way and still has its record of each step."""
        model, optimizer = make()
        with Tracer(model, optimizer, EVERY_STEP) as first, Tracer(model, optimizer, EVERY_STEP) as second:
            for _ in range(3):
                step(model, optimizer)
        assert len(first.history) == len(second.history) == 3
        traced_by = [(a.traced, b.traced) for a, b in zip(first.history, second.history, strict=True)]
        assert all(a != b for a, b in traced_by)


class TestReplicas:
    """`nn.DataParallel` runs copies of the model, which share its hooks, in threads of their own."""

    def test_a_replica_on_another_device_is_not_followed(self) -> None:
        """Its forward pass belongs to no step here; that of the replica on the watched device does."""
        model, optimizer = make()
        here = copy.copy(model)  # as torch replicates a module: its dictionaries of hooks are the same
        with torch.device("meta"):
            elsewhere = Net()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                rows, labels = batch()
                elsewhere.__dict__.update({name: value for name, value in vars(model).items() if "hooks" in name})
                elsewhere(rows.to("meta"))
                F.cross_entropy(here(rows), labels).backward()
                optimizer.step()
        for record in tracer.history:
            assert record.traced
            assert record.batch is not None
            assert record.batch.tokens == rows.numel()
            assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0

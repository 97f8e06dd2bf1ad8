"""The tracer beside optimizers, gradients, autocast, scaling and checkpointing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from small_training import (
    CLASSES,
    EVERY_STEP,
    FLOAT,
    LARGE,
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
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment, Phase
from memtrace.tracing.tracer import Tracer


class _Scratch(nn.Module):
    """Hands on what it is given; its backward pass asks for a saved tensor, then takes memory for a moment."""

    nbytes = 0

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(rows)
            return rows.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            assert len(ctx.saved_tensors) == 1
            torch.empty(_Scratch.nbytes, dtype=torch.uint8)
            return gradient

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._Function.apply(rows)


class TestOptimizers:
    """What is done with gradients and optimizers."""

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_gradients_dropped_or_zeroed(self, set_to_none: bool) -> None:
        """Dropped gradients are gone until the next backward pass, zeroed ones stay."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
        moments = tracer.history[-1].moments
        expected = parameter_bytes(model)
        assert moments[Moment.FORWARD_END][Category.GRADIENTS] == (0 if set_to_none else expected)
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == expected
        assert moments[Moment.STEP_END][Category.GRADIENTS] == expected

    def test_gradients_dropped_before_the_optimizers_step_ends(self) -> None:
        """An optimizer that frees gradients itself: at the end of the step there are none."""

        class Frees(torch.optim.Optimizer):
            def __init__(self, parameters: Any, lr: float) -> None:
                super().__init__(parameters, {"lr": lr})

            @torch.no_grad()
            def step(self, closure: Any = None) -> None:
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad, alpha=self.defaults["lr"])
                    parameter.grad = None

        model, optimizer = make(Frees)
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
        moments = tracer.history[-1].moments
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)
        assert moments[Moment.STEP_END][Category.GRADIENTS] == 0

    def test_clipping(self) -> None:
        """The norms that clipping computes are gone when the optimizer begins; gradients are the same storages."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
                optimizer.step()
        end = tracer.history[-1].moments[Moment.BACKWARD_END]
        assert end[Category.GRADIENTS] == parameter_bytes(model)
        assert end[Category.TEMPORARIES] == 0

    @pytest.mark.parametrize("name", ["LBFGS", "SGD"])
    def test_a_closure(self, name: str) -> None:
        """Forward and backward inside `step`: one step for each call, its backward ends with the last gradient."""
        torch.manual_seed(0)
        model = Net()
        optimizer = (
            torch.optim.LBFGS(model.parameters(), max_iter=3)
            if name == "LBFGS"
            else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        )
        rows, labels = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows), labels)
            loss.backward()
            return loss

        with traced(model, optimizer) as tracer:
            for _ in range(3):
                optimizer.step(closure)
        assert len(tracer.history) == 3
        moments = tracer.history[-1].moments
        assert set(moments) == set(Moment)
        assert moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)
        assert moments[Moment.STEP_END][Category.OPTIMIZER_STATE] > 0

    def test_optimizers_that_step_inside_the_backward_pass(self) -> None:
        """One optimizer a parameter, each stepping in its gradient's hook: one step, gradients one by one."""
        torch.manual_seed(0)
        model = Net()
        own = {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in model.parameters()}

        def update(parameter: torch.Tensor) -> None:
            own[parameter].step()
            own[parameter].zero_grad()

        handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in model.parameters()]
        with traced(model, list(own.values())) as tracer:
            for number in range(3):
                loss_of(model).backward()
                assert len(tracer.history) == number, "the record comes with the next forward pass"
            with torch.no_grad():
                model(batch()[0])
            assert len(tracer.history) == 3
            loss_of(model).backward()
        for handle in handles:
            handle.remove()
        assert [record.step for record in tracer.history] == [1, 2, 3, 4]
        assert all(record.traced for record in tracer.history)
        peak = tracer.history[-1].moments[Moment.PEAK]
        assert peak[Category.GRADIENTS] < parameter_bytes(model)
        assert tracer.history[-1].moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == parameter_bytes(model)

    def test_no_hook_is_left_where_nobody_takes_gradients(self) -> None:
        """torch calls a parameter that had a hook in each backward pass from then on, with or without one. The first
        parameter has one that stands for all."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(3):
                step(model, optimizer)
                assert all(parameter._post_accumulate_grad_hooks is None for parameter in [*model.parameters()][1:])
        assert tracer.history[-1].moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)

    def test_gradients_that_are_dropped_before_the_optimizer(self) -> None:
        """A second backward pass in the same step, as sharpness-aware minimisation has it: both have gradients."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                loss_of(model).backward()
                torch.empty(LARGE, dtype=torch.uint8)  # the peak of the step
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(parameter.grad, alpha=0.01)
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        for record in tracer.history:
            assert record.moments[Moment.PEAK].total_bytes > LARGE
            assert record.moments[Moment.PEAK][Category.GRADIENTS] == parameter_bytes(model)

    def test_gradients_that_hooks_take_inside_the_backward_pass(self) -> None:
        """Each hook drops the gradients of the layers behind: they are known in the first trace."""
        model, optimizer = make()
        seen: list[int] = []

        def take(gradient: torch.Tensor) -> None:
            present = [parameter for parameter in model.parameters() if parameter.grad is not None]
            if present and not seen:
                seen.append(gradient.nbytes + sum(parameter.nbytes for parameter in present))
                torch.empty(LARGE, dtype=torch.uint8)  # the peak of the step
            for parameter in present:
                parameter.grad = None

        handles = [parameter.register_hook(take) for parameter in model.parameters()]
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
        for handle in handles:
            handle.remove()
        assert tracer.history[0].moments[Moment.PEAK].total_bytes > LARGE
        assert tracer.history[0].moments[Moment.PEAK][Category.GRADIENTS] == seen[0]

    def test_gradients_that_are_taken_where_no_hook_can_be_seen(self) -> None:
        """By a hook on the graph: the first trace ends without them, the second one knows that they go."""
        model, optimizer = make()
        nodes = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.parameters()]

        def taking(parameter: torch.Tensor) -> Any:
            def take(*_: object) -> None:
                if parameter is model.second.weight:
                    torch.empty(LARGE, dtype=torch.uint8)  # the peak of the step
                parameter.grad = None

            return take

        handles = [node.register_hook(taking(p)) for node, p in zip(nodes, model.parameters(), strict=True)]
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                step(model, optimizer)
        for handle in handles:
            handle.remove()
        assert tracer.history[1].moments[Moment.PEAK].total_bytes > LARGE
        assert tracer.history[1].moments[Moment.PEAK][Category.GRADIENTS] >= model.second.weight.nbytes

    def test_what_a_second_backward_pass_takes_before_any_gradient(self) -> None:
        """It is known by the tensor that it asks for, as the first one is."""
        model = nn.Sequential(nn.Linear(WIDTH, CLASSES), _Scratch())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with traced(model, optimizer) as tracer:
            for nbytes in (0, LARGE):
                _Scratch.nbytes = nbytes
                loss_of(model).backward()
            optimizer.step()
        peak = tracer.history[-1].moments[Moment.PEAK]
        assert peak.entries[EntryKey(Category.TEMPORARIES, Phase.BACKWARD, "")] >= LARGE

    def test_what_a_backward_pass_takes_after_an_optimizer_inside_it(self) -> None:
        """It goes on with the next tensor that it asks for."""
        first, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        model = nn.Sequential(first, _Scratch(), head)
        _Scratch.nbytes = LARGE
        own = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, head)]
        with traced(model, own) as tracer:
            loss = loss_of(model)
            handle = head.weight.register_post_accumulate_grad_hook(lambda _: own[1].step())
            loss.backward()
            handle.remove()
            own[0].step()
        peak = tracer.history[-1].moments[Moment.PEAK]
        assert peak.entries[EntryKey(Category.TEMPORARIES, Phase.BACKWARD, "")] >= LARGE

    def test_parameters_added_later(self) -> None:
        """`add_param_group` in the middle of training: the next trace knows the new state."""
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
            optimizer.add_param_group({"params": list(model.first.parameters())})
            step(model, optimizer)
            step(model, optimizer)
        updated = sum(p.nbytes for p in [*model.head.parameters(), *model.first.parameters()])
        assert tracer.history[-1].moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == updated


class TestPrecision:
    """Autocast and gradient scaling."""

    def test_autocast_makes_transient_weights(self) -> None:
        """The low-precision copies of the three matrices live from forward to backward, one of each."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        moments = tracer.history[-1].moments
        # The first matrix is not needed for the gradient of its input, which nobody asked for.
        matrices = [model.second.weight, model.head.weight]
        assert moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == sum(2 * m.numel() for m in matrices)
        assert moments[Moment.BACKWARD_END][Category.TRANSIENT_WEIGHTS] == 0

    @pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
    def test_autocast_over_a_frozen_base(self, kind: str) -> None:
        """Copies of frozen parameters have no gradient function: they are told by their shape."""
        torch.manual_seed(0)
        base: nn.Module = {
            "linear": lambda: nn.Linear(WIDTH, 24),
            "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.Flatten()),
            "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 12, 3), nn.Flatten()),
        }[kind]()
        below = nn.Linear(WIDTH, WIDTH)
        base.requires_grad_(False)
        model = nn.Sequential(below, base, nn.Linear(24, CLASSES))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        moments = tracer.history[-1].moments
        copies = [p for p in base.parameters() if p.dim() > 1] + [model[2].weight]
        assert moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == sum(2 * p.numel() for p in copies)

    @pytest.mark.parametrize("overflow", [False, True], ids=["applied", "skipped"])
    def test_a_gradient_scaler(self, overflow: bool) -> None:
        """A step that the scaler skips never reaches the optimizer, and is a step all the same."""
        model, optimizer = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with traced(model, optimizer) as tracer:
            for number in range(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                scaler.scale(loss).backward()
                if overflow and number == 1:
                    model.head.weight.grad.fill_(float("inf"))
                scaler.step(optimizer)
                scaler.update()
        assert len(tracer.history) == 4
        assert scaler.get_scale() == (1.0 if overflow else 2.0)
        assert all(record.traced for record in tracer.history)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_saves_activations(self, use_reentrant: bool) -> None:
        """Of either kind: fewer activations after the forward pass than without, by the part that is computed again."""
        saved = {}
        for kind in (None, use_reentrant):
            torch.manual_seed(0)
            model = Net(kind)
            optimizer = torch.optim.AdamW(model.parameters())
            with traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
            entries = tracer.history[-1].moments[Moment.FORWARD_END].entries
            saved[kind] = sum(  # without the state of the random generator, which is of bytes
                size for key, size in entries.items() if key.category is Category.ACTIVATIONS and key.dtype == "float32"
            )
        # Input and output of the checkpointed part are saved either way, by it and by the head.
        assert saved[None] - saved[use_reentrant] == ROWS * WIDTH * FLOAT

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_checkpoint_around_the_model(self, use_reentrant: bool) -> None:
        """The model's forward pass runs again inside the backward pass: that is no forward pass of the step."""

        def run(trace: bool) -> list[float]:
            model, optimizer = make()
            losses = []
            with contextlib.ExitStack() as stack:
                tracer = stack.enter_context(Tracer(model, optimizer, EVERY_STEP)) if trace else None
                for _ in range(2):
                    optimizer.zero_grad()
                    rows, labels = batch()
                    logits = checkpoint(model, rows.requires_grad_(), use_reentrant=use_reentrant)
                    loss = F.cross_entropy(logits, labels)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
            if tracer is not None:
                assert [record.step for record in tracer.history] == [1, 2]
                # A reentrant checkpoint runs the model without gradients first: that this is no evaluation is known
                # when it runs it again, inside the backward pass.
                assert [record.traced for record in tracer.history] == [not use_reentrant, True]
                assert_law_1(tracer.history)
                assert tracer.snapshot().not_seen == ()
            return losses

        assert run(True) == run(False)

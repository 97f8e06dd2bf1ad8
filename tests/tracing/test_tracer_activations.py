"""What a step saves for its backward pass, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from small_training import (
    CLASSES,
    FLOAT,
    ON_DEMAND,
    ROWS,
    WIDTH,
    batch,
    born,
    loss_of,
    make,
    parameter_bytes,
    step,
    traced,
)
from torch.nn import functional as F

from memtrace.record.categories import Category, Moment


class TestActivations:
    """What is saved for the backward pass, and where the forward pass ends."""

    def test_a_loss_outside_the_model_saves_activations(self) -> None:
        """The forward pass ends after the loss: the probabilities that it saved are activations, by their formula."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
            step(model, optimizer)
        forward_end = tracer.history[-1].moments[Moment.FORWARD_END]
        hidden, probabilities, mean_weight = ROWS * WIDTH * FLOAT, ROWS * CLASSES * FLOAT, FLOAT
        assert forward_end[Category.ACTIVATIONS] == 3 * hidden + probabilities + mean_weight

    def test_labels_of_a_loss_outside_the_model_are_inputs(self) -> None:
        """The model never sees them: they are known because the loss saves them."""
        with born() as source:
            model, optimizer = make()
            with traced(model, optimizer, ON_DEMAND, source=source) as tracer:
                step(model, optimizer)
                step(model, optimizer)
        inputs = {
            key.dtype: size
            for key, size in tracer.history[-1].moments[Moment.FORWARD_END].entries.items()
            if key.category is Category.INPUTS
        }
        assert inputs == {"float32": ROWS * WIDTH * FLOAT, "int64": ROWS * 8}

    def test_activations_grow_with_the_batch_and_weights_do_not(self) -> None:
        """Twice the batch, twice the activations."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for rows in (5, 10):
                step(model, optimizer, rows)
        small, large = (record.moments[Moment.FORWARD_END] for record in tracer.history)
        assert large[Category.ACTIVATIONS] - FLOAT == 2 * (small[Category.ACTIVATIONS] - FLOAT)
        assert large[Category.WEIGHTS] == small[Category.WEIGHTS]

    def test_retained_graph_and_second_backward(self) -> None:
        """Two backward passes through one graph: still one step, activations until the second one."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward(retain_graph=True)
                loss.backward()
                optimizer.step()
                del loss
        assert tracer.history[-1].moments[Moment.STEP_END][Category.ACTIVATIONS] == 0


class TestLeaks:
    """What is kept and claimed by nobody."""

    @pytest.mark.parametrize("with_graph", [False, True], ids=["detached", "with graph"])
    def test_logits_in_a_list(self, with_graph: bool) -> None:
        """They are unattributed at the end of the step, to the byte; with their graph kept, its tensors too."""
        kept: list[torch.Tensor] = []
        with born() as source:
            model, optimizer = make()
            with traced(model, optimizer, ON_DEMAND, source=source) as tracer:
                for _ in range(2):
                    optimizer.zero_grad()
                    rows, labels = batch()
                    logits = model(rows)
                    kept.append(logits if with_graph else logits.detach())
                    F.cross_entropy(logits, labels).backward()
                    optimizer.step()
        step_end = tracer.history[-1].moments[Moment.STEP_END]
        assert step_end[Category.UNATTRIBUTED] == 2 * ROWS * CLASSES * FLOAT
        assert step_end[Category.ACTIVATIONS] == 0

    def test_a_loss_summed_with_its_graph(self) -> None:
        """The classic one, before any backward: a whole forward pass is kept, saved by nobody's step."""
        total = torch.zeros(())
        with born() as source:
            model, optimizer = make()
            with traced(model, optimizer, ON_DEMAND, source=source) as tracer:
                for _ in range(2):
                    optimizer.zero_grad()
                    loss = loss_of(model)
                    total = total + loss
                    loss.backward(retain_graph=True)
                    optimizer.step()
        moments = tracer.history[-1].moments
        one_forward = moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        assert one_forward > 0
        assert moments[Moment.STEP_END][Category.UNATTRIBUTED] > 2 * one_forward

    def test_a_growing_list_in_a_traced_step(self) -> None:
        """Kept within the traced step itself: unattributed by the phase that asked for it."""
        kept: list[torch.Tensor] = []
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                rows, labels = batch()
                logits = model(rows)
                kept.append(logits * 2)
                F.cross_entropy(logits, labels).backward()
                kept.extend(parameter.grad.clone() for parameter in model.parameters())
                optimizer.step()
        entries = tracer.history[-1].moments[Moment.STEP_END].entries
        unattributed = {key.component: size for key, size in entries.items() if key.category is Category.UNATTRIBUTED}
        assert unattributed["backward"] == parameter_bytes(model)
        assert unattributed["forward"] >= ROWS * CLASSES * FLOAT

    def test_tensors_of_the_user_that_are_freed(self) -> None:
        """What the user makes and drops within the step is temporary, not a leak."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                loss = loss_of(model)
                noise = torch.randn(1000)
                loss.backward()
                del noise, loss
                optimizer.step()
        moments = tracer.history[-1].moments
        assert moments[Moment.STEP_END][Category.UNATTRIBUTED] == 0
        assert moments[Moment.PEAK][Category.TEMPORARIES] >= 1000 * FLOAT

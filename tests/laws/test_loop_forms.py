"""Every form of a loop is seen: steps are counted as the loop has them and traced, from before the model is built."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from laws.birth import events_from_birth
from laws.loop_forms import FORMS, Form, Training
from nothing_left import recorders_of_torch

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.sources.events import EventSource
from memtrace.tracing.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0, "history": 1000}
EVERY_STEP, DEFAULT = TracerConfig(**QUIET, trace_every=1), TracerConfig(**QUIET)


def train(
    form: Form, config: TracerConfig | None, source: EventSource | None = None
) -> tuple[list[float], Training, Tracer | None]:
    """Trains from the same seed; returns the losses, what was trained, and the tracer."""
    torch.manual_seed(0)
    training = form.build()
    tracer = None if config is None else Tracer(training.model, [*training.optimizers], config, source=source)
    with nullcontext() if tracer is None else tracer:
        losses = [loss.item() for loss in islice(form.run(training), form.iterations)]
    return losses, training, tracer


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_seen(form: Form, caplog: pytest.LogCaptureFixture) -> None:
    """Law 1 at every moment of every step that is traced, which are all but those in which what is called is not known
    yet; nobody's memory is small, nothing is said, and the training is the same to the bit."""
    with events_from_birth() as source, caplog.at_level(logging.WARNING, logger="memtrace"):
        losses, training, tracer = train(form, EVERY_STEP, source)
    assert tracer is not None
    assert losses == train(form, None)[0]
    assert [record.step for record in tracer.history] == [*range(1, form.steps + 1)]
    assert [record.step for record in tracer.history if not record.traced] == [*form.untraced]
    weights = sum(parameter.nbytes for parameter in training.model.parameters())
    for record in tracer.history:
        for moment, breakdown in record.moments.items():
            assert breakdown[Category.WEIGHTS] == weights
            if record.traced:
                assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)
                assert breakdown[Category.UNATTRIBUTED] <= form.unclaimed
        if record.traced:
            assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
            assert record.moments[Moment.BACKWARD_END][Category.GRADIENTS] > 0
    assert tracer.snapshot().not_seen == ()
    assert [found.getMessage() for found in caplog.records] == []
    for module in training.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert recorders_of_torch() == {}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_traced_in_time(form: Form) -> None:
    """With default settings: one of the first steps, and all are counted."""
    _, _, tracer = train(form, DEFAULT)
    assert tracer is not None
    assert tracer.snapshot().totals.steps == form.steps
    assert any(record.traced for record in tracer.history[:3])
    assert all(record.batch is not None for record in tracer.history if record.step not in form.untraced)

"""Models of which parts are wrapped in DistributedDataParallel, on one rank in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from small_training import EVERY_STEP, ON_DEMAND
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memtrace.config import TracerConfig
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

FLOAT, STEPS = 4, 6
REBUILT = 3
"""The first step that begins with buckets that the reducer has rebuilt."""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """One rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inside, 64), nn.ReLU(), nn.Linear(64, outside))


def done(reduced: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    found: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    found.set_result(reduced)
    return found


def in_ddp(module: nn.Module, *, views: bool) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=views)
    # one rank has the sum already; gloo would copy it, and give the copy back on a thread of its own
    wrapped.register_comm_hook(None, lambda _, bucket: done(bucket.buffer()))
    return wrapped


def size_of(*modules: nn.Module) -> int:
    return FLOAT * sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("wrapped", [1, 2], ids=["beside a bare part", "each wrapped"])
@pytest.mark.parametrize("config", [EVERY_STEP, ON_DEMAND], ids=["traced", "counted"])
def test_each_wrapped_part_has_its_buckets(config: TracerConfig, wrapped: int, *, views: bool) -> None:
    """A generator and a discriminator under one tracer: the buckets of each wrapper, to the byte, in every step."""
    parts: list[nn.Module] = [network(32, 48), network(48, 8)]
    buckets = 0 if views else size_of(*parts[:wrapped])
    for place in range(wrapped):
        parts[place] = in_ddp(parts[place], views=views)
    optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
    with Tracer(nn.ModuleList(parts), optimizers, config) as tracer:
        for _ in range(STEPS):
            parts[1](parts[0](torch.ones(4, 32))).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    told = [record for record in tracer.history if record.step >= REBUILT or not record.traced]
    assert [record.step for record in told if record.traced == (config is EVERY_STEP)][-4:] == [3, 4, 5, 6]
    for record in told:
        end = record.moments[Moment.STEP_END]
        assert end[Category.COMM_BUFFERS] == buckets
        assert end[Category.GRADIENTS] == end[Category.WEIGHTS] == size_of(*parts)
        for moment in record.moments.values() if record.traced else ():
            assert moment.total_bytes == moment.allocated_bytes
        if record.traced:
            peak = record.moments[Moment.PEAK]
            assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


def ends(config: TracerConfig) -> Sequence[StepRecord]:
    """Trains a part whose gradients are views of buckets beside one that keeps its own gradients, which are the larger
    ones; the first part's are dropped before the step is over."""
    model = in_ddp(network(32, 48), views=True)
    beside = nn.Linear(48, 512)
    optimizer = torch.optim.AdamW([*model.parameters(), *beside.parameters()])
    with Tracer(model, optimizer, config, explicit_steps=True) as tracer:
        for _ in range(STEPS):
            tracer.begin_step()
            beside(model(torch.ones(4, 32))).sum().backward()
            optimizer.step()
            model.zero_grad()
            tracer.end_step()
    buckets, kept = size_of(model), size_of(beside)
    assert kept > buckets
    for record in tracer.history[REBUILT - 1 :]:
        assert record.moments[Moment.STEP_END][Category.GRADIENTS] == buckets + kept
    return tracer.history[REBUILT - 1 :]


def test_gradients_beside_the_buckets_do_not_hide_that_theirs_are_dropped() -> None:
    """What an optimizer updates besides keeps its gradients: counted steps have as much as traced ones."""
    assert all(record.traced for record in ends(EVERY_STEP))
    assert not any(record.traced for record in ends(ON_DEMAND))


UNUSED, STATIC = {"find_unused_parameters": True}, {"static_graph": True}


@pytest.mark.parametrize(
    ("settings", "traced"),
    [(settings, step) for settings in (UNUSED, STATIC, {}) for step in range(2, 6) if (settings, step) != (STATIC, 2)],
    ids=str,
)
def test_a_trace_of_any_step_has_the_buckets(settings: dict[str, bool], traced: int) -> None:
    """Those that were rebuilt in the step before are there before the reducer tells of them; where it looks for unused
    parameters, those that it began with stay."""
    model = DistributedDataParallel(network(32, 48), **settings)
    model.register_comm_hook(None, lambda _, bucket: done(bucket.buffer()))
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, ON_DEMAND, explicit_steps=True) as tracer:
        for step in range(1, STEPS):
            if step == traced:
                tracer.trace_next()
            tracer.begin_step()
            model(torch.ones(4, 32)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracer.end_step()
    record = tracer.history[traced - 1]
    assert record.traced
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
        assert moment[Category.UNATTRIBUTED] <= 64
    for name in (Moment.BACKWARD_END, Moment.STEP_END, Moment.PEAK):
        assert record.moments[name][Category.COMM_BUFFERS] == size_of(model)

"""FSDP2's parameter groups: what asking them costs, and the forms that versions of torch have them in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from workers.fsdp_on_a_cpu import let_fsdp_train

from memtrace.attribution.engines import find_engines
from memtrace.config import TracerConfig
from memtrace.record.limitations import Unseen
from memtrace.sources import engines_torch_private
from memtrace.tracing.tracer import Tracer

BLOCK, CPU = 10, torch.device("cpu")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One rank, in this process."""
    let_fsdp_train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh, blocks: int) -> nn.Module:
    model = nn.Sequential(*[nn.Sequential(*[nn.Linear(4, 4) for _ in range(BLOCK)]) for _ in range(blocks)])
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Calls(NamedTuple):
    """What a traced step calls."""

    own: int
    """How often memtrace's own functions are entered, generators each time they go on."""
    all: int
    """Calls of all functions in the step, of torch's and of those in C too: the step itself grows with its layers."""


def calls_of_a_traced_step(model: nn.Module) -> Calls:
    """Returns how often functions are entered in a traced step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = everything = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal own, everything
        own += event == "call" and "memtrace" in frame.f_code.co_filename
        everything += event in ("call", "c_call")

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    config = TracerConfig(strict=True, port=None, step_log=False, trace_every=1, device_poll_seconds=0)
    with Tracer(model, optimizer, config) as tracer:
        step()
        step()
        sys.setprofile(count)
        step()
        sys.setprofile(None)
        assert tracer.latest is not None
        assert tracer.latest.traced
    return Calls(own, everything)


def test_a_traced_step_grows_with_the_parameters(mesh: DeviceMesh) -> None:
    """Not with their square: four times as many take four times as many calls."""
    few, many = calls_of_a_traced_step(sharded(mesh, 5)), calls_of_a_traced_step(sharded(mesh, 20))
    assert many.own <= 4.2 * few.own
    assert many.all <= 4.2 * few.all


@pytest.mark.long
def test_a_traced_step_of_two_thousand_parameters(mesh: DeviceMesh) -> None:
    """Takes at most six times the calls of one of 500, in Python and in C."""
    few, many = sharded(mesh, 25), sharded(mesh, 100)
    assert [len([*model.parameters()]) for model in (few, many)] == [500, 2000]
    few_calls, many_calls = calls_of_a_traced_step(few), calls_of_a_traced_step(many)
    assert many_calls.own <= 4.2 * few_calls.own
    assert many_calls.all <= 6 * few_calls.all


def test_a_model_is_moved_between_steps(mesh: DeviceMesh) -> None:
    """As where the weights leave the device for a generation: torch swaps a DTensor, if nobody refers to it weakly."""
    model = sharded(mesh, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = TracerConfig(strict=True, port=None, step_log=False, trace_every=2, device_poll_seconds=0)
    with Tracer(model, optimizer, config) as tracer:
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.to(CPU)
        assert [record.traced for record in tracer.history] == [False, True, False, True]


def test_roles_follow_the_parameters(mesh: DeviceMesh) -> None:
    """Sharded and gathered forms are known, other parameters are plain weights."""
    model = sharded(mesh, 2)
    (engine,) = find_engines(model, [])
    model(torch.ones(1, 4))
    engine.claim_gathered(model[0], SimpleNamespace(claim_all=lambda *_: None))  # type: ignore[arg-type]
    (group,) = engines_torch_private.fsdp_groups(model[0]) or ()
    known = group.fsdp_params[0]
    assert str(engine.role_of(known.sharded_param)).count("weights")
    assert engine.role_of(engines_torch_private.fsdp_gathered_parameter(known)).component == "all_gather"
    assert engine.role_of(nn.Parameter(torch.ones(1))) is None


class State:
    """What `fully_shard` keeps of a module."""

    def __init__(self, **groups: Any) -> None:
        vars(self).update(groups)


def module_with(state: object) -> Any:
    return SimpleNamespace(_get_fsdp_state=lambda: state)


@pytest.mark.parametrize(
    ("state", "groups"),
    [
        (State(_fsdp_param_groups=[1, 2]), [1, 2]),
        (State(_fsdp_param_group=1), [1]),
        (State(_fsdp_param_group=None), []),
        (State(), None),
    ],
    ids=["2.13", "2.11", "2.11 without parameters", "changed"],
)
def test_groups_of_all_versions_are_read(state: State, groups: list[int] | None) -> None:
    """One group at most up to torch 2.11, several from then on; None where torch has changed."""
    assert engines_torch_private.fsdp_groups(module_with(state)) == groups


@pytest.mark.parametrize("name", ["reduce_scatter_states", "reduce_scatter_state"])
def test_buffers_of_all_versions_are_read(name: str) -> None:
    """A list of states that wait, or one at most."""
    buffer = torch.ones(1)
    state = SimpleNamespace(reduce_scatter_input=buffer)
    context = SimpleNamespace(**{name: [state] if name.endswith("s") else state})
    assert [*engines_torch_private.fsdp_context_buffers(context)] == [("reduce_scatter", buffer)]
    nothing = SimpleNamespace(**{name: [] if name.endswith("s") else None})
    assert [*engines_torch_private.fsdp_context_buffers(nothing)] == []


def test_groups_that_cannot_be_read_are_said(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line of the log and as a metric; the model trains and is traced all the same."""
    monkeypatch.setattr(FSDPModule, "_get_fsdp_state", lambda _: State())
    model = nn.Linear(4, 4)
    model.__class__ = type("Sharded", (FSDPModule, nn.Linear), {})
    assert said_of(model, caplog) == ["FSDP2"]


def said_of(model: nn.Module, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Trains three steps and returns the engines of which the log says that they cannot be read."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracer = Tracer(model, optimizer, TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0))
    with caplog.at_level(logging.WARNING, logger="memtrace"), tracer:
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert tracer.snapshot().not_seen == (Unseen.ENGINE,)
    return [record.message.partition("does not show what ")[2].partition(" keeps")[0] for record in caplog.records]


@pytest.mark.parametrize("engine", ["DDP", "FSDP1"])
def test_the_same_of_other_engines(
    engine: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch no longer shows the buckets of DDP, or the flat parameters of FSDP1."""
    name = "shows_ddp_buckets" if engine == "DDP" else "shows_flat_parameter"
    monkeypatch.setattr(engines_torch_private, name, lambda _: False)
    model = nn.Linear(4, 4)
    wrapped = DistributedDataParallel(model) if engine == "DDP" else FullyShardedDataParallel(model, device_id=CPU)
    assert said_of(wrapped, caplog) == [engine]

"""How often memtrace walks over a model, and what it knows from one walk."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memtrace.attribution.gradients import GradientCount
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.held import Held, weakly
from memtrace.attribution.scan import Scan
from memtrace.config import TracerConfig
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category
from memtrace.tracing.tracer import Tracer

CPU = torch.device("cpu")


class Walked(nn.Sequential):
    """A model that counts how often somebody looks at all of it: whatever lists parameters lists modules for them."""

    walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_modules(*args, **kwargs)
        self.walks += 1


def test_one_walk_at_attach_and_one_in_a_traced_step() -> None:
    """None in a counted one; with frozen parameters and a buffer, which have walks of their own elsewhere."""
    model = Walked(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters())

    def walks() -> int:
        """Makes a step; returns how often the model was walked over in it."""
        before = model.walks
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.walks - before

    config = TracerConfig(strict=True, port=None, step_log=False, trace_every=0, device_poll_seconds=0)
    tracer = Tracer(model, optimizer, config)
    before = model.walks
    tracer.attach()
    assert (before, model.walks) == (2, 2), "the other one is the optimizer's list of parameters"
    walks()  # looks for engines around the model
    assert (walks(), tracer.latest.traced) == (1, True)
    assert (walks(), tracer.latest.traced) == (0, False)
    tracer.trace_next()
    assert (walks(), tracer.latest.traced) == (1, True)
    tracer.detach()


def test_tied_and_shared_tensors_are_held_once_in_the_order_of_the_model() -> None:
    """As the model's own lists have them."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    held = Held(model.modules())
    assert [*map(id, held.parameters())] == [*map(id, model.parameters())]
    assert [*map(id, held.buffers())] == [*map(id, model.buffers())]


def test_scripted_modules_are_held() -> None:
    """Their lists of parameters are other objects."""
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    held = Held(model.modules())
    assert (len(held.parameters()), len(held.buffers())) == (4, 3)


def test_a_parameter_that_is_replaced_is_let_go_and_the_new_one_known() -> None:
    """Also between two walks: where something has gone, the next look is a new one."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scan, ledger = Scan(model, optimizer), Ledger(CPU)
    optimizer.param_groups[0]["params"].pop(0)
    gone = weakref.ref(model[0].weight)
    model[0].weight = nn.Parameter(torch.ones(8, 4))
    assert gone() is None
    scan.claim_persistent(ledger, anew=False)
    assert sum(ledger.totals().values()) == (32 + 16) * 4


def test_totals_are_added_up_anew_after_every_change() -> None:
    """A claim, another role, a death, a storage of another size, everything forgotten."""
    ledger = Ledger(CPU)
    kept, dropped = torch.ones(4), torch.ones(8)

    def sizes() -> dict[Category, int]:
        return {tag.category: size for tag, size in ledger.totals().items()}

    ledger.claim(kept, Category.ACTIVATIONS)
    assert sizes() == {Category.ACTIVATIONS: 16}
    ledger.claim(dropped, Category.GRADIENTS)
    assert sizes() == {Category.ACTIVATIONS: 16, Category.GRADIENTS: 32}
    ledger.claim(kept, Category.WEIGHTS)
    del dropped
    assert sizes() == {Category.WEIGHTS: 16}
    kept.untyped_storage().resize_(64)
    ledger.live()
    assert sizes() == {Category.WEIGHTS: 64}
    ledger.clear()
    assert sizes() == {}


def test_gradients_of_many_parameters_are_counted_as_they_come_and_go() -> None:
    """All at once in the next count; a few as soon as their turn has come."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(200)]
    count = GradientCount(map(weakly, parameters), CPU)

    def counted() -> int:
        return sum(count.count().values())

    assert counted() == 0
    for parameter in parameters:
        parameter.grad = torch.zeros(2)
    assert counted() == 200 * 8
    parameters[77].grad = None
    assert min(counted() for _ in range(4)) == 199 * 8
    assert count.count() == {EntryKey(Category.GRADIENTS, "", "float32"): 199 * 8}
    for parameter in parameters:
        parameter.grad = None
    assert counted() == 0


def test_all_are_asked_before_an_amount_that_stays_tells_that_nothing_has_changed() -> None:
    """One of 200 has come with the amount that is allocated now: each count asks a part of them."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(200)]
    count = GradientCount(map(weakly, parameters), CPU)
    assert sum(count.count(100).values()) == 0
    parameters[77].grad = torch.zeros(2)
    assert sum(count.count(100).values()) == 0
    found = [sum(count.count(108).values()) for _ in range(4)]
    assert found[-1] == 8
    parameters[78].grad = torch.zeros(2)
    assert [sum(count.count(108).values()) for _ in range(4)] == [8] * 4

"""Law 5: a run is bit-identical with and without memtrace, over all families, recipes and ways to run a step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from laws.families import Combination, combinations
from laws.loop import Loop

from memtrace.config import TracerConfig
from memtrace.tracing.tracer import Tracer

STEPS = 3
EVERY_STEP = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that a run leaves to be compared."""

    losses: list[torch.Tensor]
    weights: list[torch.Tensor]
    state: list[torch.Tensor]
    random_state: torch.Tensor
    learned: bool
    """Whether the weights have changed."""


def train(combination: Combination, *, traced: bool) -> Outcome:
    """Runs a few steps from one seed; with every step traced, or without memtrace."""
    torch.manual_seed(0)
    loop = Loop(combination)
    losses: list[torch.Tensor] = []
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    if traced:
        with Tracer(loop.model, loop.optimizer, EVERY_STEP) as tracer:
            for _ in range(STEPS):
                losses += loop.step()
        assert [record.traced for record in tracer.history] == [True] * STEPS
    else:
        for _ in range(STEPS):
            losses += loop.step()
    tensors = [*loop.model.parameters(), *loop.model.buffers(), *loop.masters]
    state = [tensor for values in loop.optimizer.state.values() for tensor in values.values()]
    learned = not same_bits(before, [*loop.model.parameters()])
    return Outcome(losses, tensors, state, torch.get_rng_state(), learned)


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit; a NaN equals itself."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_losses_and_weights_are_the_same_bits(combination: Combination) -> None:
    """Losses, weights, buffers, master weights, optimizer state and the random number generator."""
    bare, traced = train(combination, traced=False), train(combination, traced=True)
    assert same_bits(bare.losses, traced.losses)
    assert same_bits(bare.weights, traced.weights)
    assert same_bits(bare.state, traced.state)
    assert torch.equal(bare.random_state, traced.random_state)
    assert bare.learned

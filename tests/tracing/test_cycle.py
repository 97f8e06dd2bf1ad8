"""Where a step of several optimizers ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memtrace.attribution.scan import Scan
from memtrace.tracing.cycle import Cycle


def cycle_of(count: int) -> tuple[Cycle, list[torch.optim.Optimizer]]:
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    return Cycle(Scan(model, optimizers)), optimizers


def played(turns: str) -> str:
    """Returns who has stepped, with a bar where a step of the training has ended."""
    cycle, optimizers = cycle_of(3 if "c" in turns else 2 if "b" in turns else 1)
    return "".join(who + "|" * cycle.stepped(optimizers["abc".index(who)]) for who in turns)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("aaa", "a|a|a|"),
        ("abab", "ab|ab|"),
        ("aaaaab" * 2, "aaaaab|aaaaab|"),
        ("abbbbb" * 2, "ab|bbbba|bbbbb"),  # begun in the middle: the next cycles are whole ones
        ("abcabc", "abc|abc|"),
        ("b" * 18 + "abab", "b" * 16 + "|b|b|ab|ab|"),  # idle, joins
        ("b" * 16 + ("a" + "b" * 20) * 2, "b" * 16 + "|" + ("a" + "b|" * 20) * 2),  # too seldom to be waited for
        ("ab" + "b" * 17 + "a" * 17, "ab|" + "b" * 16 + "|b|" + "a" * 16 + "|a|"),  # the other one idles
        ("b" * 17 + "abab" + "b" * 17, "b" * 16 + "|b|ab|ab|" + "b" * 16 + "|b|"),  # idles again
    ],
)
def test_where_steps_end(turns: str, expected: str) -> None:
    """A step waits for every optimizer that has not been left behind by 16 steps of another one."""
    assert played(turns) == expected


def test_an_optimizer_that_is_gone_is_not_waited_for() -> None:
    """From the second step of the other one on, in the middle of a cycle; with the first one from the next cycle on."""
    cycle, optimizers = cycle_of(2)
    assert [cycle.stepped(optimizers[1])] == [False]
    del optimizers[0]
    assert [cycle.stepped(optimizers[0]) for _ in range(3)] == [True, True, True]


def test_no_step_is_endless_whoever_steps() -> None:
    """Of many optimizers in any order, a step ends after 16 steps of one of them at the latest."""
    cycle, optimizers = cycle_of(5)
    generator = torch.Generator().manual_seed(0)
    since = [0] * 5
    for chosen in torch.randint(0, 5, (2000,), generator=generator).tolist():
        since[chosen] += 1
        if cycle.stepped(optimizers[chosen]):
            since = [0] * 5
        assert max(since) < 16

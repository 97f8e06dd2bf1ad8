"""Law 8: torch's own check of saved tensors that were changed in place is neither hidden nor set off by memtrace."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtrace.config import TracerConfig
from memtrace.tracing.tracer import Tracer

TRACED = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)
Body = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A layer, something done with what it gives, and a BatchNorm whose statistics are written in place."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.body = body

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.body(self, rows)


def result_multiplied(net: Any, rows: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(net.layer(rows)).mul_(2)


def result_multiplied_later(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(net.layer(rows))
    result = hidden * 3
    hidden.add_(1)
    return result


def view_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = torch.exp(net.layer(rows))
    hidden[0] = 0
    return hidden


def written_through_detach(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = torch.sigmoid(net.layer(rows))
    hidden.detach().zero_()
    return hidden


def base_written_after_a_view_was_saved(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = net.layer(rows)
    result = hidden[:, :2].square()
    hidden.mul_(2)
    return result


def input_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    result = net.layer(rows)
    rows.zero_()
    return result


def weight_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    result = net.layer(torch.tanh(net.layer(rows)))
    with torch.no_grad():
        net.layer.weight.mul_(0.5)
    return result


def other_operand_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    scale = torch.ones(4)
    result = net.layer(rows) * scale
    scale.add_(1)
    return result


def mask_filled(net: Any, rows: torch.Tensor) -> torch.Tensor:
    scores = torch.softmax(net.layer(rows), -1)
    return scores.masked_fill_(scores < 0.2, 0)


def written_through_data(net: Any, rows: torch.Tensor) -> torch.Tensor:
    """`.data` has a version of its own: torch does not notice, and no more may memtrace."""
    hidden = torch.sigmoid(net.layer(rows))
    hidden.data.mul_(2)
    return hidden


def activation_in_place(net: Any, rows: torch.Tensor) -> torch.Tensor:
    return F.relu(net.layer(rows), inplace=True)


def sum_in_place(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = net.layer(rows)
    hidden += 1
    hidden.mul_(2)
    return hidden


def chain_of_views(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = net.layer(rows).view(2, 2, -1).transpose(0, 1)
    hidden.add_(1)
    return hidden.reshape(-1, 4).square()


def running_statistics(net: Any, rows: torch.Tensor) -> torch.Tensor:
    return net.norm(net.norm(net.layer(rows)))


def unused_part_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = net.layer(rows)
    result = hidden.exp()
    hidden.zero_()  # exp keeps what it gave, not what it was given
    return result


def dropped_and_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = F.dropout(net.layer(rows), 0.5, training=True)
    hidden.mul_(2)
    return hidden


def detached_and_written(net: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden = net.layer(rows)
    hidden.detach().clone().zero_()
    return hidden.square()


FORBIDDEN: tuple[Body, ...] = (
    result_multiplied,
    result_multiplied_later,
    view_written,
    written_through_detach,
    base_written_after_a_view_was_saved,
    input_written,
    weight_written,
    other_operand_written,
    mask_filled,
)
ALLOWED: tuple[Body, ...] = (
    written_through_data,
    activation_in_place,
    sum_in_place,
    chain_of_views,
    running_statistics,
    unused_part_written,
    dropped_and_written,
    detached_and_written,
)


OF_A_VIEW = (base_written_after_a_view_was_saved, weight_written)
"""A view was saved whose base is written: torch names the node that it would make for it anew, AsStrided."""


def plain(loss: torch.Tensor, net: Net) -> None:
    loss.backward()


def twice(loss: torch.Tensor, net: Net) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def of_gradients(loss: torch.Tensor, net: Net) -> None:
    parameters = [*net.layer.parameters()]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    (loss + sum(gradient.square().sum() for gradient in gradients)).backward()


def weights_written_between(loss: torch.Tensor, net: Net) -> None:
    """A graph that is kept over a change of the weights."""
    loss.backward(retain_graph=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    loss.backward()


def freed(loss: torch.Tensor, net: Net) -> None:
    loss.backward()
    loss.backward()


BACKWARDS = (plain, twice, of_gradients, weights_written_between, freed)


def run(body: Body, backward: Callable[[torch.Tensor, Net], None], *, traced: bool) -> tuple[list[str], list[Any]]:
    """Returns what two steps raise, and the gradients after each."""
    torch.manual_seed(0)
    net = Net(body)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch: AbstractContextManager[Any] = Tracer(net, optimizer, TRACED) if traced else nullcontext()
    raised: list[str] = []
    gradients: list[Any] = []
    with watch:
        for _ in range(2):
            try:
                backward(net(torch.randn(4, 4)).sum(), net)
            except RuntimeError as error:
                raised.append(str(error))
            gradients.append([None if p.grad is None else p.grad.tolist() for p in net.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    return raised, gradients


def without_node(outcome: tuple[list[str], list[Any]]) -> tuple[list[str], list[Any]]:
    """Leaves the name of the node out of what was raised."""
    raised, gradients = outcome
    return [re.sub(r"which is output \d+ of \w+", "which is an output", text) for text in raised], gradients


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("body", FORBIDDEN + ALLOWED)
def test_the_same_is_raised(body: Body, backward: Callable[[torch.Tensor, Net], None]) -> None:
    """With every step traced: the same message, or none, and the same gradients to the bit."""
    bare, traced = run(body, backward, traced=False), run(body, backward, traced=True)
    if body in OF_A_VIEW:
        bare, traced = without_node(bare), without_node(traced)
    assert traced == bare
    if body in FORBIDDEN:
        assert len(bare[0]) == 2
    elif backward is plain:
        assert bare[0] == []

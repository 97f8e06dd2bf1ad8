"""Counted steps tell the truth: whatever changes under them is counted as it is, in the step in which it does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.held import Held
from memtrace.attribution.scan import Scan
from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

WIDTH = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = layer(rows.to(layer.weight.dtype)).relu()
        return (rows * self.scale.to(rows.dtype)).sum()


kept: list[object] = []
"""What a change keeps of the storages from before, as a loop does that puts them back; emptied after each test."""


def data_replaced(model: Net, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def data_swapped_with_what_is_kept(model: Net, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        kept.append(parameter.data)
        parameter.data = parameter.data.double()


def to_another_type(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.to(torch.float64)


def one_layer_to_another_type(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.layers[1].to(torch.float64)


def loaded_by_assignment(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, assign=True)


def optimizer_loaded(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def state_replaced(model: Net, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()


def state_added(model: Net, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["slow"] = state["exp_avg"].clone()


def state_cleared(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def layer_and_group_added(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.layers.append(nn.Linear(WIDTH, WIDTH, bias=False))
    optimizer.add_param_group({"params": model.layers[-1].parameters()})


def frozen_module_added(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.extra = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)


def layer_replaced_and_kept(model: Net, optimizer: torch.optim.Optimizer) -> None:
    kept.append(model.layers[1])
    model.layers[1] = nn.Linear(WIDTH, WIDTH, bias=True)


def layer_taken_out(model: Net, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"].pop()]
    del model.layers[2]


def parameter_added_to_a_leaf(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.layers[0].adapter = nn.Parameter(torch.zeros(WIDTH))


def buffer_replaced_and_kept(model: Net, optimizer: torch.optim.Optimizer) -> None:
    kept.append(model.scale)
    model.scale = model.scale.double()


CHANGES = (
    data_replaced,
    data_swapped_with_what_is_kept,
    to_another_type,
    one_layer_to_another_type,
    loaded_by_assignment,
    optimizer_loaded,
    state_replaced,
    state_added,
    state_cleared,
    layer_and_group_added,
    frozen_module_added,
    layer_replaced_and_kept,
    layer_taken_out,
    parameter_added_to_a_leaf,
    buffer_replaced_and_kept,
)

OF_ANOTHER_TYPE = (data_swapped_with_what_is_kept, to_another_type, one_layer_to_another_type)
"""Run with SGD: Adam refuses moments of another type than its parameters."""


def shown_and_held(tracer: Tracer, model: Net, optimizer: torch.optim.Optimizer) -> tuple[tuple[int, ...], ...]:
    """Returns bytes of weights, state and buffers: as the last record has them, and as they are."""
    assert tracer.latest is not None
    assert not tracer.latest.traced
    shown = tracer.latest.moments[Moment.STEP_END]
    state = [value for of_parameter in optimizer.state.values() for value in of_parameter.values()]
    weights = {*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])}
    held = (weights, state, [*model.buffers()])
    categories = (Category.WEIGHTS, Category.OPTIMIZER_STATE, Category.BUFFERS)
    return tuple(shown[category] for category in categories), tuple(sum(t.nbytes for t in part) for part in held)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_counted_in_the_next_step(
    change: Callable[[Net, torch.optim.Optimizer], None],
) -> None:
    """Weights, optimizer state and buffers in the very step after the change, and after one more."""
    model = Net()
    kind = torch.optim.SGD if change in OF_ANOTHER_TYPE else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-3)
    with Tracer(model, optimizer, TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)) as tracer:

        def step() -> None:
            model(torch.randn(4, WIDTH)).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(4):
            step()
        shown, held = shown_and_held(tracer, model, optimizer)
        assert shown == held
        change(model, optimizer)
        for _ in range(2):
            step()
            shown, held = shown_and_held(tracer, model, optimizer)
            assert shown == held
    kept.clear()


def test_nothing_is_claimed_anew_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counted step of a training that goes on as before walks over no model."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer(model, optimizer, TracerConfig(strict=True, port=None, trace_every=0, device_poll_seconds=0)) as tracer:
        for number in range(6):
            if number == 4:
                monkeypatch.setattr("memtrace.attribution.scan.Held", None)
            model(torch.randn(4, WIDTH)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [record.traced for record in tracer.history] == [False, True, False, False, False, False]


def test_a_model_is_looked_at_where_the_allocator_counts_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at each module and tensor takes longer than all else of a counted step."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    scan, ledger = Scan(model, optimizer), Ledger(torch.device("cpu"))
    assert [scan.keep_up(ledger, size) for size in (1000, 1000)] == [True, False]
    looked = []
    monkeypatch.setattr(Held, "is_as_walked", property(lambda _: not looked.append(1)))
    for size, looks in ((1000, 0), (1001, 1), (1001, 1), (None, 2), (None, 3), (1001, 4)):
        assert not scan.keep_up(ledger, size)
        assert len(looked) == looks
    model.layers[0].weight.data = torch.ones(WIDTH, WIDTH)  # the storage of before dies
    assert scan.keep_up(ledger, 1001)


def test_replicas_of_data_parallel_are_said_not_to_be_followed(caplog: pytest.LogCaptureFixture) -> None:
    """One line of the log, where there is more than one device."""
    for devices, lines in (([], 0), ([0, 1], 1)):
        model = nn.DataParallel(Net())
        model.device_ids = devices
        caplog.clear()
        Tracer(model, torch.optim.AdamW(model.parameters()), TracerConfig(strict=True, port=None))
        assert sum("replicas" in message for message in caplog.messages) == lines

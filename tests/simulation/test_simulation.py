"""Torch on tensors without memory: every block that real tensors would take is an event, and nothing else is."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtrace.errors import PlanError
from memtrace.simulation.kernels import Target
from memtrace.simulation.mode import Simulation
from memtrace.simulation.operator_results import Call, OperatorResults
from memtrace.simulation.results import ViewOf
from memtrace.simulation.tensor import SimulatedTensor, layout_of
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    """A simulation with an open window."""
    simulation = Simulation()
    simulation.events.open()
    yield simulation
    simulation.events.abandon()


def deltas(window: Window) -> list[int]:
    """Sizes of the blocks in the order in which they came and went; single numbers are left out."""
    return [event.delta for event in window.events if abs(event.delta) > 8]


def measured(work: Callable[[], object]) -> list[int]:
    """Returns what the CPU's allocator really does for a piece of work."""
    source = CpuEvents()
    gc.collect()
    assert source.open()
    work()
    return deltas(source.close())


def test_what_operators_allocate_and_free_is_what_a_cpu_does(simulation: Simulation) -> None:
    """Sizes and order of blocks are those of the real allocator, temporaries included."""

    def work() -> None:
        a = torch.zeros(30, 40)
        b = (a @ torch.ones(40, 10)).relu() + 1
        c = b[:, 2:].contiguous().softmax(-1)
        c.mul_(2)
        torch.cat([c, c]).to(torch.bfloat16)

    with simulation:
        work()
    assert deltas(simulation.events.close()) == measured(work)


def test_slices_are_those_of_torch() -> None:
    """Ends beyond the tensor, counted from its end or left out, with steps: the same view as torch's own."""
    results = OperatorResults(Target.CPU)
    ends = list(itertools.product([None, 0, 1, -2, 9, -9], [None, 0, 3, -1, 2**63 - 1, -9], [1, 2]))
    for tensor in (torch.empty(7), torch.empty(5, 3).t(), torch.empty(4, 1, 2), torch.empty(0, 3)):
        for dim, (start, end, step) in itertools.product(range(-tensor.dim(), tensor.dim()), ends):
            arguments = (tensor, dim, start, end, step)
            real = torch.ops.aten.slice.Tensor(*arguments)
            found = results.of(Call.of(torch.ops.aten.slice.Tensor, arguments, {}))
            assert found == ViewOf(0, layout_of(real), real.storage_offset()), arguments
    assert len(results) == 0, "none is asked of torch's fake kernels, which takes longer than all else of a slice"


def test_what_is_made_for_the_host_is_counted_there(simulation: Simulation) -> None:
    """A tensor that is made there or moves there takes no block of the device; what is freed is free on either side."""
    with simulation:
        with simulation.on_host():
            made = torch.empty(100)
        moved = torch.empty(50)
        part = moved[10:]
        simulation.to_host(part)
        simulation.to_host(moved)
        assert simulation.host_bytes == 600
        del moved, part
        with simulation.on_host():
            torch.empty(100)
        assert simulation.host_bytes == made.nbytes == 400
        torch.empty(25)
    assert deltas(simulation.events.close()) == [200, -200, 100, -100]


def test_a_training_step_has_the_events_of_the_real_one(simulation: Simulation) -> None:
    """Forward, backward and optimizer of a small network: block by block what the CPU's allocator does."""

    def step(module: nn.Module) -> None:
        hidden = torch.zeros(50, 20)
        for _ in range(2):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            F.gelu(module(hidden)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    real, simulated = nn.Linear(20, 30), nn.Linear(20, 30, device="meta")
    simulation.adopt_module(simulated)
    simulation.events.abandon()
    simulation.events.open()
    with simulation:
        step(simulated)
    assert deltas(simulation.events.close()) == measured(lambda: step(real))


def test_gradients_of_a_tensor_used_twice_are_summed_in_place(simulation: Simulation) -> None:
    """Where autograd holds a gradient alone it adds to it in place, as it does with real tensors."""

    def work() -> None:
        leaf = torch.zeros(100, requires_grad=True)
        used = leaf * 3
        (used.exp() + used.sin() + used.cos()).sum().backward()

    with simulation:
        work()
    assert deltas(simulation.events.close()) == measured(work)


def test_views_share_one_block(simulation: Simulation) -> None:
    """Views, transposes and slices of a tensor take nothing, and keep its block alive."""
    with simulation:
        base = torch.zeros(4, 6)
        view = base.t()[1:].unsqueeze(0)
        del base
        assert view.untyped_storage().nbytes() == 96
        assert (view.shape, view.stride(), view.storage_offset()) == ((1, 5, 4), (5, 1, 6), 1)
        del view
    assert deltas(simulation.events.close()) == [96, -96]


def test_adopted_modules_keep_their_ties(simulation: Simulation) -> None:
    """Parameters that two modules share, and buffers that are views of one storage, are one block."""
    module = nn.Module()
    module.embedding = nn.Embedding(10, 4, device="meta")
    module.head = nn.Linear(4, 10, bias=False, device="meta")
    module.head.weight = module.embedding.weight
    flat = torch.zeros(8, device="meta")
    module.register_buffer("left", flat[:4])
    module.register_buffer("right", flat[4:])
    simulation.adopt_module(module)
    assert module.head.weight is module.embedding.weight
    assert isinstance(module.head.weight, nn.Parameter)
    assert sorted(deltas(simulation.events.close())) == [32, 160]


def test_an_lstm_is_told_of_its_new_parameters(simulation: Simulation) -> None:
    """Modules that list their parameters themselves list the simulated ones afterwards."""
    module = nn.LSTM(4, 4, device="meta")
    simulation.adopt_module(module)
    assert all(isinstance(weight, SimulatedTensor) for weight in module._flat_weights)


@pytest.mark.parametrize("time", ["first", "again"])
def test_one_gradient_for_two_biases_is_copied_for_one(simulation: Simulation, time: str) -> None:
    """oneDNN's LSTM returns one tensor as the gradient of both: autograd clones it, also when asked a second time."""
    lstm = nn.LSTM(16, 16, batch_first=True)
    simulation.adopt_module(lstm)
    with simulation, torch.backends.mkldnn.flags(enabled=True):
        lstm(torch.zeros(4, 8, 16))[0].sum().backward()
    first, second = (
        bias.grad.untyped_storage() for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0) if bias.grad is not None
    )
    assert first is not second


def test_values_of_integers_are_known(simulation: Simulation) -> None:
    """What follows from the batch's integers can be asked for, as model code does."""
    mask = simulation.adopt(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    with simulation:
        assert not bool((mask == 1).all())
        lengths = mask.sum(-1)
        lengths[0] += 5
        assert lengths.tolist() == [7, 3]
        assert mask.nonzero().shape == (5, 2)
        assert torch.arange(4)[-1].item() == 3
        assert float(torch.tensor(0.5)) == 0.5


def test_what_is_overwritten_with_something_unknown_is_not_known_any_more(simulation: Simulation) -> None:
    """A value that follows from activations is refused with what to do."""
    with simulation:
        counts = torch.zeros(3, dtype=torch.long)
        counts.copy_(torch.empty(3).long())
        with pytest.raises(PlanError, match="depends on values"):
            counts.tolist()


def test_what_no_kernel_of_a_cpu_writes_is_not_known_any_more(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator for a device alone is simulated; what it has written to is not taken for what was there before."""

    def refuses(*_: object) -> None:
        raise NotImplementedError("could not run with arguments from the CPU backend")

    with simulation:
        counts = torch.ones(4, dtype=torch.long)
        assert counts.tolist() == [1, 1, 1, 1]
        monkeypatch.setattr("memtrace.simulation.known_values.run", refuses)
        counts.add_(1)
        with pytest.raises(PlanError, match="depends on values"):
            counts.tolist()


def test_shapes_that_depend_on_activations_are_refused(simulation: Simulation) -> None:
    """A mixture of experts that picks tokens by value names the way out."""
    with simulation, pytest.raises(PlanError, match="experts_implementation='batched_mm'"):
        (torch.empty(5) > 0).nonzero()


def test_what_an_operator_refuses_is_refused_as_torch_does(
    simulation: Simulation, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes that do not fit raise torch's own error, without a traceback in the log."""
    with simulation, pytest.raises(RuntimeError, match="same reduction dim"):
        torch.zeros(2, 3) @ torch.zeros(4, 5)
    assert not caplog.records


def test_simulated_tensors_cannot_leave_their_simulation(simulation: Simulation) -> None:
    """Outside of the mode an operator says what happened instead of computing nonsense."""
    tensor = simulation.adopt(torch.zeros(3))
    with pytest.raises(PlanError, match="outside of its simulation"):
        tensor + 1
    assert "SimulatedTensor((3,), torch.float32)" in repr(tensor)


def test_the_list_operators_of_optimizers_answer_for_each_element(simulation: Simulation) -> None:
    """A foreach operator returns one tensor for each element, of that element's size."""
    with simulation:
        tensors = [torch.zeros(size, dtype=dtype) for size in (3, 5) for dtype in (torch.float32, torch.bfloat16)]
        roots = torch._foreach_sqrt(tensors)
        torch._foreach_add_(roots, 1.5)
    assert [(root.shape, root.dtype) for root in roots] == [(tensor.shape, tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize(
    ("target", "weight", "expected"),
    [
        (Target.CPU, torch.bfloat16, torch.bfloat16),
        (Target.CPU, torch.float32, torch.float32),
        (Target.CUDA, torch.bfloat16, torch.float32),
    ],
)
def test_norms_keep_statistics_as_the_kernels_of_the_device_do(
    target: Target, weight: torch.dtype, expected: torch.dtype
) -> None:
    """CUDA keeps mean and deviation in float32; a CPU only where the weights are."""
    with Simulation(target):
        ones = torch.ones(8, dtype=weight)
        _, mean, deviation = torch.native_layer_norm(torch.zeros(4, 8, dtype=torch.bfloat16), [8], ones, ones, 1e-5)
    assert (mean.dtype, deviation.dtype) == (expected, expected)


def test_norm_statistics_of_a_cpu_are_as_simulated() -> None:
    """The real kernel of this machine keeps the statistics in the type that the simulation says."""
    for weight in (torch.bfloat16, torch.float32):
        ones = torch.ones(8, dtype=weight)
        _, mean, _ = torch.native_layer_norm(torch.zeros(4, 8, dtype=torch.bfloat16), [8], ones, ones, 1e-5)
        assert mean.dtype is weight


@pytest.mark.needs("grouped matrix products")
def test_grouped_products_take_float32(simulation: Simulation) -> None:
    """The experts of a mixture multiply in any type, although torch's fake kernel knows bfloat16 alone."""
    with simulation:
        tokens, experts = torch.zeros(12, 8), torch.zeros(3, 8, 16)
        ends = torch.tensor([4, 8, 12], dtype=torch.int32)
        product = torch._grouped_mm(tokens, experts, offs=ends)
    assert (product.shape, product.dtype) == ((12, 16), torch.float32)


def test_a_window_lists_what_was_there_before_it(simulation: Simulation) -> None:
    """Blocks from before the window are listed."""
    simulation.events.abandon()
    with simulation:
        kept = torch.zeros(25)
        simulation.events.open()
        torch.zeros(10)
    window = simulation.events.close()
    assert window.live_at_begin is not None
    assert [block.nbytes for block in window.live_at_begin] == [100]
    assert [event.delta for event in window.events] == [40, -40]
    assert kept.shape == (25,)


def test_only_one_window_is_open_at_a_time(simulation: Simulation) -> None:
    """Opening an open source does nothing and says so."""
    assert simulation.events.is_open
    assert not simulation.events.open()
    assert not simulation.events.interrupted()
    assert simulation.events.reading() is None

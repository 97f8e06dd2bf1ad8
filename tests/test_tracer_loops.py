"""The tracer in the loops that people write."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from memtrace.breakdown import StepRecord
from memtrace.categories import Category, Moment
from memtrace.config import TracerConfig
from memtrace.sources.cpu import CpuEvents
from memtrace.tracer import Tracer

EVERY_STEP = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)
ON_DEMAND = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=0)
ROWS, WIDTH, CLASSES = 6, 16, 10
FLOAT = 4


class Net(nn.Module):
    """A hidden layer, a middle that uses one layer twice and can be checkpointed, and a head."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(rows))
        if self.use_reentrant is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.use_reentrant)
        return self.head(hidden)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.second(hidden))))


def make(kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, kind(model.parameters(), lr=0.01)


def batch(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(0, CLASSES, (rows,))


def loss_of(model: nn.Module, rows: int = ROWS) -> torch.Tensor:
    inputs, labels = batch(rows)
    return F.cross_entropy(model(inputs), labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = ROWS) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, rows)
    loss.backward()
    optimizer.step()
    return loss.item()


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_law_1(records: Sequence[StepRecord]) -> None:
    """The categories add up to what was allocated, at every moment of every traced step."""
    assert any(record.traced for record in records)
    for record in records:
        for moment, breakdown in record.moments.items():
            if record.traced:
                assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)


@contextlib.contextmanager
def traced(model: nn.Module, optimizers: Any, config: TracerConfig = EVERY_STEP, **settings: Any) -> Iterator[Tracer]:
    """A tracer whose records obey law 1."""
    with Tracer(model, optimizers, config, **settings) as tracer:
        yield tracer
    assert_law_1(tracer.history)


@contextlib.contextmanager
def born() -> Iterator[CpuEvents]:
    """A source that is open before anything is built."""
    gc.collect()
    source = CpuEvents()
    assert source.open()
    yield source
    source.abandon()


class TestSteps:
    """What counts as one step."""

    def test_accumulation_is_one_step(self) -> None:
        """Several forward and backward passes, one step of the optimizer: one record, with all micro batches."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                for rows in (2, 5, 3):
                    loss_of(model, rows).backward()
                optimizer.step()
        assert [record.step for record in tracer.history] == [1, 2]
        shape = tracer.history[-1].batch
        assert shape is not None
        assert (shape.shape, shape.tokens) == ((5, WIDTH), 10 * WIDTH)
        assert shape.largest_micro_batch_tokens == 5 * WIDTH

    def test_evaluation_between_steps_is_no_step(self) -> None:
        """Forward passes without gradients make no record and leave no hooks on."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                step(model, optimizer)
                with torch.no_grad():
                    model(torch.randn(100, WIDTH))
                with torch.inference_mode():
                    model(torch.randn(100, WIDTH))
        assert [record.batch.tokens for record in tracer.history if record.batch] == [ROWS * WIDTH] * 2
        assert len(tracer.history) == 2

    def test_evaluation_inside_a_step_is_not_its_forward_pass(self) -> None:
        """A look at other data between backward and the optimizer belongs to the step's events, not to its batch."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            loss_of(model).backward()
            with torch.no_grad():
                model(torch.randn(100, WIDTH))
            optimizer.step()
        shape = tracer.history[-1].batch
        assert shape is not None
        assert shape.tokens == ROWS * WIDTH

    def test_several_optimizers_make_one_step(self) -> None:
        """The step ends when the last of them has stepped; each one's state has its components."""
        torch.manual_seed(0)
        model = Net()
        first = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.AdamW([*model.second.parameters(), *model.head.parameters()])
        with traced(model, [first, second]) as tracer:
            for _ in range(2):
                loss_of(model).backward()
                first.step()
                second.step()
                first.zero_grad()
                second.zero_grad()
        assert len(tracer.history) == 2
        parts = {key.component for key in tracer.history[-1].moments[Moment.STEP_END].entries}
        assert parts >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}

    def test_an_optimizer_without_a_forward_pass_of_the_model(self) -> None:
        """A step on gradients that came from elsewhere is a step without a forward pass."""
        model, optimizer = make()
        with Tracer(model, optimizer, ON_DEMAND) as tracer:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert tracer.latest is not None
        assert tracer.latest.batch is None
        assert Moment.FORWARD_END not in tracer.latest.moments

    def test_the_loop_tells_its_steps(self) -> None:
        """With explicit steps, two calls of the optimizer can be one step, and one outside belongs to none."""
        model, optimizer = make()
        with traced(model, optimizer, explicit_steps=True) as tracer:
            tracer.begin_step()
            step(model, optimizer)
            step(model, optimizer)
            tracer.end_step()
            step(model, optimizer)
            tracer.begin_step(7)
            step(model, optimizer)
            tracer.end_step()
        assert [record.step for record in tracer.history] == [1, 7]

    def test_a_smaller_last_batch(self) -> None:
        """Each record has the shape of its own batch."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for rows in (8, 8, 3):
                step(model, optimizer, rows)
        assert [record.batch.shape for record in tracer.history if record.batch] == [(8, 16), (8, 16), (3, 16)]


class TestSchedule:
    """Which steps are traced."""

    def test_the_first_step_with_state_is_traced(self) -> None:
        """The second one: the first makes the state."""
        model, optimizer = make()
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for _ in range(4):
                step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, True, False, False]

    def test_without_state_it_is_the_second_step_too(self) -> None:
        """Plain SGD never has state."""
        model, optimizer = make(torch.optim.SGD)
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for _ in range(3):
                step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, True, False]

    def test_the_next_step_on_demand(self) -> None:
        """`trace_next()` makes one step a traced one."""
        model, optimizer = make()
        with traced(model, optimizer, ON_DEMAND) as tracer:
            for number in range(1, 6):
                if number == 4:
                    tracer.trace_next()
                step(model, optimizer)
        assert [record.step for record in tracer.history if record.traced] == [2, 4]

    def test_law_1_holds_however_often_and_however_large(self) -> None:
        """Traces far apart, batches that come and go, and addresses that are used again in between."""
        model, optimizer = make()
        every_third = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=3)
        with traced(model, optimizer, every_third) as tracer:
            for number in range(60):
                step(model, optimizer, rows=1 + number * 7 % 13)
        assert sum(record.traced for record in tracer.history) == 20


class TestOptimizers:
    """What is done with gradients and optimizers."""

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_gradients_dropped_or_zeroed(self, set_to_none: bool) -> None:
        """Dropped gradients are gone until the next backward pass, zeroed ones stay."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
        moments = tracer.history[-1].moments
        expected = parameter_bytes(model)
        assert moments[Moment.FORWARD_END][Category.GRADIENTS] == (0 if set_to_none else expected)
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == expected
        assert moments[Moment.STEP_END][Category.GRADIENTS] == expected

    def test_gradients_dropped_before_the_optimizers_step_ends(self) -> None:
        """An optimizer that frees gradients itself: at the end of the step there are none."""

        class Frees(torch.optim.Optimizer):
            def __init__(self, parameters: Any, lr: float) -> None:
                super().__init__(parameters, {"lr": lr})

            @torch.no_grad()
            def step(self, closure: Any = None) -> None:
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad, alpha=self.defaults["lr"])
                    parameter.grad = None

        model, optimizer = make(Frees)
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
        moments = tracer.history[-1].moments
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)
        assert moments[Moment.STEP_END][Category.GRADIENTS] == 0

    def test_clipping(self) -> None:
        """The norms that clipping computes are gone when the optimizer begins; gradients are the same storages."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
                optimizer.step()
        end = tracer.history[-1].moments[Moment.BACKWARD_END]
        assert end[Category.GRADIENTS] == parameter_bytes(model)
        assert end[Category.TEMPORARIES] == 0

    @pytest.mark.parametrize("name", ["LBFGS", "SGD"])
    def test_a_closure(self, name: str) -> None:
        """Forward and backward inside `step`: one step for each call, its backward ends with the last gradient."""
        torch.manual_seed(0)
        model = Net()
        optimizer = (
            torch.optim.LBFGS(model.parameters(), max_iter=3)
            if name == "LBFGS"
            else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        )
        rows, labels = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows), labels)
            loss.backward()
            return loss

        with traced(model, optimizer) as tracer:
            for _ in range(3):
                optimizer.step(closure)
        assert len(tracer.history) == 3
        moments = tracer.history[-1].moments
        assert set(moments) == set(Moment)
        assert moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
        assert moments[Moment.BACKWARD_END][Category.GRADIENTS] == parameter_bytes(model)
        assert moments[Moment.STEP_END][Category.OPTIMIZER_STATE] > 0

    def test_optimizers_that_step_inside_the_backward_pass(self) -> None:
        """One optimizer a parameter, each stepping in its gradient's hook: one step, gradients one by one."""
        torch.manual_seed(0)
        model = Net()
        own = {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in model.parameters()}

        def update(parameter: torch.Tensor) -> None:
            own[parameter].step()
            own[parameter].zero_grad()

        handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in model.parameters()]
        with traced(model, list(own.values())) as tracer:
            for number in range(3):
                loss_of(model).backward()
                assert len(tracer.history) == number, "the record comes with the next forward pass"
            with torch.no_grad():
                model(batch()[0])
            assert len(tracer.history) == 3
            loss_of(model).backward()
        for handle in handles:
            handle.remove()
        assert [record.step for record in tracer.history] == [1, 2, 3, 4]
        assert all(record.traced for record in tracer.history)
        peak = tracer.history[-1].moments[Moment.PEAK]
        assert peak[Category.GRADIENTS] < parameter_bytes(model)
        assert tracer.history[-1].moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == parameter_bytes(model)

    def test_parameters_added_later(self) -> None:
        """`add_param_group` in the middle of training: the next trace knows the new state."""
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        with traced(model, optimizer) as tracer:
            step(model, optimizer)
            optimizer.add_param_group({"params": list(model.first.parameters())})
            step(model, optimizer)
            step(model, optimizer)
        updated = sum(p.nbytes for p in [*model.head.parameters(), *model.first.parameters()])
        assert tracer.history[-1].moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == updated


class TestPrecision:
    """Autocast and gradient scaling."""

    def test_autocast_makes_transient_weights(self) -> None:
        """The low-precision copies of the three matrices live from forward to backward, one of each."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        moments = tracer.history[-1].moments
        # The first matrix is not needed for the gradient of its input, which nobody asked for.
        matrices = [model.second.weight, model.head.weight]
        assert moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == sum(2 * m.numel() for m in matrices)
        assert moments[Moment.BACKWARD_END][Category.TRANSIENT_WEIGHTS] == 0

    @pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
    def test_autocast_over_a_frozen_base(self, kind: str) -> None:
        """Copies of frozen parameters have no gradient function: they are told by their shape."""
        torch.manual_seed(0)
        base: nn.Module = {
            "linear": lambda: nn.Linear(WIDTH, 24),
            "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.Flatten()),
            "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 12, 3), nn.Flatten()),
        }[kind]()
        below = nn.Linear(WIDTH, WIDTH)
        base.requires_grad_(False)
        model = nn.Sequential(below, base, nn.Linear(24, CLASSES))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with traced(model, optimizer) as tracer:
            for _ in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        moments = tracer.history[-1].moments
        copies = [p for p in base.parameters() if p.dim() > 1] + [model[2].weight]
        assert moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == sum(2 * p.numel() for p in copies)

    @pytest.mark.parametrize("overflow", [False, True], ids=["applied", "skipped"])
    def test_a_gradient_scaler(self, overflow: bool) -> None:
        """A step that the scaler skips never reaches the optimizer: its events belong to the next one."""
        model, optimizer = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with traced(model, optimizer) as tracer:
            for number in range(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                scaler.scale(loss).backward()
                if overflow and number == 1:
                    model.head.weight.grad.fill_(float("inf"))
                scaler.step(optimizer)
                scaler.update()
        assert len(tracer.history) == (3 if overflow else 4)
        assert scaler.get_scale() == (1.0 if overflow else 2.0)
        assert all(record.traced for record in tracer.history)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_saves_activations(self, use_reentrant: bool) -> None:
        """Of either kind: fewer activations after the forward pass than without, by the part that is computed again."""
        saved = {}
        for kind in (None, use_reentrant):
            torch.manual_seed(0)
            model = Net(kind)
            optimizer = torch.optim.AdamW(model.parameters())
            with traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
            saved[kind] = tracer.history[-1].moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        # Input and output of the checkpointed part are saved either way, by it and by the head.
        assert saved[None] - saved[use_reentrant] == ROWS * WIDTH * FLOAT

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_checkpoint_around_the_model(self, use_reentrant: bool) -> None:
        """The model's forward pass runs again inside the backward pass: that is no forward pass of the step."""

        def run(trace: bool) -> list[float]:
            model, optimizer = make()
            losses = []
            with contextlib.ExitStack() as stack:
                tracer = stack.enter_context(Tracer(model, optimizer, EVERY_STEP)) if trace else None
                for _ in range(2):
                    optimizer.zero_grad()
                    rows, labels = batch()
                    logits = checkpoint(model, rows.requires_grad_(), use_reentrant=use_reentrant)
                    loss = F.cross_entropy(logits, labels)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
            if tracer is not None:
                assert [record.step for record in tracer.history] == [1, 2]
                # A reentrant checkpoint runs the model without gradients first: as an evaluation, which is not traced.
                assert all(record.traced is not use_reentrant for record in tracer.history)
            return losses

        assert run(True) == run(False)


class TestExceptions:
    """A step that does not end."""

    @pytest.mark.parametrize("part", ["forward", "loss", "backward", "optimizer"])
    def test_the_loop_goes_on_after_an_exception(self, part: str) -> None:
        """The exception is the caller's; the step that it cut off is finished by the next one."""
        model, optimizer = make()

        def fail(*_: object) -> None:
            raise ArithmeticError("of the user")

        with traced(model, optimizer) as tracer:
            step(model, optimizer)
            with pytest.raises(ArithmeticError, match="of the user"):
                optimizer.zero_grad()
                handle = model.head.register_forward_pre_hook(fail) if part == "forward" else None
                try:
                    loss = loss_of(model)
                finally:
                    if handle is not None:
                        handle.remove()
                if part == "loss":
                    fail()
                if part == "backward":
                    loss.register_hook(fail)
                loss.backward()
                handle = optimizer.register_step_pre_hook(fail)
                try:
                    optimizer.step()
                finally:
                    handle.remove()
            step(model, optimizer)
            step(model, optimizer)
        assert [record.step for record in tracer.history] == [1, 2, 3]
        assert all(record.traced for record in tracer.history)

    def test_a_second_run_in_the_same_process(self) -> None:
        """New model, new optimizer, new tracer, after a run that an exception ended: as the first one."""
        outcomes = []
        for _ in range(2):
            torch.manual_seed(0)
            model, optimizer = make()
            with pytest.raises(ZeroDivisionError), traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
                loss_of(model)
                _ = 1 // 0
            moments = tracer.history[-1].moments
            outcomes.append({moment: dict(breakdown.entries) for moment, breakdown in moments.items()})
        assert outcomes[0] == outcomes[1]

    def test_one_model_traced_again(self) -> None:
        """A second tracer on the same model and optimizer sees what the first one saw."""
        model, optimizer = make()
        seen = []
        for _ in range(2):
            with traced(model, optimizer) as tracer:
                step(model, optimizer)
                step(model, optimizer)
            seen.append(dict(tracer.history[-1].moments[Moment.STEP_END].entries))
        assert seen[0] == seen[1]


class TestTwoTracers:
    """Two tracers at once."""

    def test_on_two_models(self) -> None:
        """A generator and a discriminator: on a CPU only one of them can record at a time, and both have records."""
        left, right = make(), make()
        with Tracer(*left, EVERY_STEP) as first, Tracer(*right, EVERY_STEP) as second:
            for _ in range(3):
                step(*left)
                step(*right)
        assert len(first.history) == len(second.history) == 3
        assert_law_1(first.history)
        assert_law_1(second.history)

    def test_on_one_model(self) -> None:
        """The second one gives way and still has its record of each step."""
        model, optimizer = make()
        with Tracer(model, optimizer, EVERY_STEP) as first, Tracer(model, optimizer, EVERY_STEP) as second:
            for _ in range(3):
                step(model, optimizer)
        assert len(first.history) == len(second.history) == 3
        traced_by = [(a.traced, b.traced) for a, b in zip(first.history, second.history, strict=True)]
        assert all(a != b for a, b in traced_by)


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


class Recorder:
    """Saved-tensor hooks of a user: they count, and pack into a box so that a lost call would show."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def pack(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        self.packed += 1
        return "packed", tensor * 1

    def unpack(self, box: tuple[str, torch.Tensor]) -> torch.Tensor:
        self.unpacked += 1
        assert box[0] == "packed"
        return box[1]


class TestHooksOfTheUser:
    """Saved-tensor hooks that the user has put on."""

    def run(self, where: str, trace: bool) -> tuple[list[float], int, int]:
        """Three steps with the user's hooks in one place; returns losses and how often the hooks were called."""
        recorder = Recorder()
        hooks: Callable[[], Any] = lambda: saved_tensors_hooks(recorder.pack, recorder.unpack)  # noqa: E731

        class Inside(Net):
            def middle(self, hidden: torch.Tensor) -> torch.Tensor:
                with hooks() if where == "inside" else contextlib.nullcontext():
                    return super().middle(hidden)

        torch.manual_seed(0)
        model = Inside()
        optimizer = torch.optim.AdamW(model.parameters())
        losses = []
        with contextlib.ExitStack() as stack:
            if trace:
                stack.enter_context(traced(model, optimizer))
            if where == "around the loop":
                stack.enter_context(hooks())
            for _ in range(3):
                optimizer.zero_grad()
                rows, labels = batch()
                with hooks() if where == "around the model" else contextlib.nullcontext():
                    logits = model(rows)
                with hooks() if where == "around the loss" else contextlib.nullcontext():
                    loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, recorder.packed, recorder.unpacked

    @pytest.mark.parametrize("where", ["inside", "around the model", "around the loss", "around the loop"])
    def test_are_called_as_without_memtrace(self, where: str) -> None:
        """As often, with the same losses, wherever they were put on."""
        bare, with_tracer = self.run(where, False), self.run(where, True)
        assert with_tracer == bare
        assert bare[1] > 0

    def test_around_one_of_two_micro_batches(self) -> None:
        """Put on and taken off while a traced step goes on: each block takes off its own pair."""
        recorder = Recorder()
        model, optimizer = make()
        with traced(model, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model).backward()
                with saved_tensors_hooks(recorder.pack, recorder.unpack):
                    loss = loss_of(model)
                loss.backward()
                optimizer.step()
        assert recorder.packed == recorder.unpacked > 0

    @pytest.mark.parametrize("where", ["outside", "inside"])
    def test_offloading_to_the_cpu(self, where: str) -> None:
        """torch's own `save_on_cpu`, around the model or in it: same losses."""

        def run(trace: bool) -> list[float]:
            torch.manual_seed(0)
            model = Net()
            if where == "inside":
                middle = model.middle

                def offloaded(hidden: torch.Tensor) -> torch.Tensor:
                    with save_on_cpu():
                        return middle(hidden)

                model.middle = offloaded  # type: ignore[method-assign]
            optimizer = torch.optim.AdamW(model.parameters())
            losses = []
            with contextlib.ExitStack() as stack:
                if trace:
                    stack.enter_context(traced(model, optimizer))
                for _ in range(2):
                    optimizer.zero_grad()
                    with save_on_cpu() if where == "outside" else contextlib.nullcontext():
                        loss = loss_of(model)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
            return losses

        assert run(True) == run(False)

    def test_forbidden_hooks_are_not_put_on(self) -> None:
        """Where the user forbids saved-tensor hooks the step is traced without activations, and does not fail."""
        model, optimizer = make()
        with traced(model, optimizer) as tracer, torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            step(model, optimizer)
        forward_end = tracer.history[-1].moments[Moment.FORWARD_END]
        assert forward_end[Category.ACTIVATIONS] == 0
        assert forward_end[Category.WEIGHTS] == parameter_bytes(model)


class TestProfilersOfTheUser:
    """torch's profiler cannot nest: the user's comes first."""

    def test_a_profile_around_the_loop(self) -> None:
        """Its data is complete, and no step is traced while it runs; afterwards tracing goes on."""
        model, optimizer = make()
        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step(model, optimizer)
                step(model, optimizer)
            step(model, optimizer)
        assert [record.traced for record in tracer.history] == [False, False, True]
        assert_law_1(tracer.history)
        counts = {event.key: event.count for event in profiler.key_averages()}
        assert counts["aten::linear"] == 8
        assert counts["Optimizer.step#AdamW.step"] == 2

    @pytest.mark.parametrize("where", ["forward", "loss"])
    def test_a_profile_begun_inside_a_traced_step(self, where: str) -> None:
        """memtrace gives way: the profile has every operator from where it began. (Begun inside a backward pass, a
        profile is empty without memtrace too.)"""
        model, optimizer = make()
        profiler = profile(activities=[ProfilerActivity.CPU])
        begun = []

        def begin(*_: object) -> None:
            if not begun:
                begun.append(True)
                profiler.start()

        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            step(model, optimizer)
            rows, labels = batch()
            handle = model.second.register_forward_pre_hook(begin) if where == "forward" else None
            logits = model(rows)
            if handle is not None:
                handle.remove()
            if where == "loss":
                begin()
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            with record_function("marked by the user"):
                optimizer.step()
            profiler.stop()
            step(model, optimizer)
        names = {event.key for event in profiler.key_averages()}
        assert {"marked by the user", "Optimizer.step#AdamW.step", "aten::mm"} <= names
        if where == "forward":
            assert "aten::linear" in names
        assert [record.traced for record in tracer.history] == [True, False, True]


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

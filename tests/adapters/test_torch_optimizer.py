"""The wrapper behaves as the optimizer that it wraps."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from memtrace import Category, ConfigError, MemoryTracer, MemTraceOptimizer, Moment, TracerConfig
from memtrace.errors import OutputError

QUIET = {"port": None, "step_log": False, "strict": True}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, scheduler=None, scaler=None
) -> list[float]:
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_the_bare_optimizer(name: str) -> None:
    """Losses, weights and state are bit for bit those of the bare optimizer, with every step traced."""
    bare_model, model = make_model(), make_model()
    bare = OPTIMIZERS[name](bare_model.parameters())
    with MemTraceOptimizer(OPTIMIZERS[name](model.parameters()), model, trace_every=1, **QUIET) as wrapped:
        assert train(model, wrapped) == train(bare_model, bare)
        assert len(wrapped.tracer.history) == 4
        assert all(record.traced for record in wrapped.tracer.history)
        left, right = wrapped.state_dict(), bare.state_dict()
    assert_same_weights(model, bare_model)
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, state in left["state"].items():
        for component, value in state.items():
            other = right["state"][key][component]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_is_an_optimizer_whose_attributes_are_the_wrapped_ones() -> None:
    """Groups, state and defaults are the same objects; attributes are written through."""
    model = make_model()
    inner = torch.optim.AdamW(model.parameters())
    with MemTraceOptimizer(inner, model, **QUIET) as wrapped:
        assert isinstance(wrapped, torch.optim.Optimizer)
        assert wrapped.param_groups is inner.param_groups
        assert wrapped.state is inner.state
        assert wrapped.defaults is inner.defaults
        wrapped.param_groups[0]["lr"] = 0.5
        assert inner.param_groups[0]["lr"] == 0.5
        wrapped.note = "kept"
        assert inner.note == "kept"
        del wrapped.note
        assert not hasattr(inner, "note")
        assert repr(inner) in repr(wrapped)


def test_state_dict_moves_between_wrapped_and_bare() -> None:
    """A checkpoint of one loads into the other, in both directions."""
    model, other_model = make_model(), make_model()
    with MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, **QUIET) as wrapped:
        train(model, wrapped, steps=2)
        bare = torch.optim.AdamW(other_model.parameters())
        bare.load_state_dict(copy.deepcopy(wrapped.state_dict()))
        other_model.load_state_dict(model.state_dict())
        assert train(model, wrapped) == train(other_model, bare)
        wrapped.load_state_dict(copy.deepcopy(bare.state_dict()))
        model.load_state_dict(other_model.state_dict())
        assert train(model, wrapped) == train(other_model, bare)


def test_added_group_is_trained_and_attributed() -> None:
    """Parameters of a group that was added later are updated, and their state is counted."""
    model = make_model()
    first, last = model[0], model[2]
    with MemTraceOptimizer(torch.optim.AdamW(first.parameters()), model, trace_every=1, **QUIET) as wrapped:
        train(model, wrapped, steps=2)
        wrapped.add_param_group({"params": list(last.parameters()), "lr": 0.1})
        before = last.weight.clone()
        train(model, wrapped, steps=2)
        assert not torch.equal(before, last.weight)
        state = wrapped.tracer.latest.moments[Moment.STEP_END][Category.OPTIMIZER_STATE]
        parameters = list(model.parameters())
        assert state == sum(2 * p.nbytes + 4 for p in parameters)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[2],
        ),
    ],
)
def test_learning_rate_schedulers_see_no_difference(make) -> None:
    """The schedule and the training are the same, and no scheduler warns that the optimizer has not stepped."""
    bare_model, model = make_model(), make_model()
    bare = torch.optim.AdamW(bare_model.parameters(), lr=0.05)
    with (
        MemTraceOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), model, **QUIET) as wrapped,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        scheduler, bare_scheduler = make(wrapped), make(bare)
        assert train(model, wrapped, scheduler=scheduler) == train(bare_model, bare, scheduler=bare_scheduler)
        assert scheduler.get_last_lr() == bare_scheduler.get_last_lr()
        assert len(wrapped.tracer.history) == 4


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_scales_skips_and_steps(fused: bool) -> None:
    """Scaled gradients are unscaled once, also by a fused optimizer that is handed the scale; inf skips the step."""
    bare_model, model = make_model(), make_model()
    bare = torch.optim.AdamW(bare_model.parameters(), lr=0.01, fused=fused)
    with MemTraceOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), model, **QUIET) as wrapped:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        bare_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        assert train(model, wrapped, scaler=scaler) == train(bare_model, bare, scaler=bare_scaler)
        assert_same_weights(model, bare_model)
        for other, each, optimizer in ((bare_scaler, bare_model, bare), (scaler, model, wrapped)):
            other.scale(each(torch.full((4, 8), 1e38)).square().mean()).backward()
            other.step(optimizer)
            other.update()
            optimizer.zero_grad()
        assert_same_weights(model, bare_model)
        assert scaler.get_scale() == bare_scaler.get_scale()


def test_closure_is_called_and_its_loss_returned() -> None:
    """`step(closure)` returns what the wrapped optimizer returns, and the step is recorded."""
    model = make_model()
    batch = torch.randn(4, 8)
    with MemTraceOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3), model, **QUIET) as wrapped:

        def closure() -> torch.Tensor:
            wrapped.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            return loss

        first, second = wrapped.step(closure), wrapped.step(closure)
        assert second < first
        assert wrapped.tracer.latest.step == 2


def test_accelerator_prepare_trains_the_same() -> None:
    """Prepared by Accelerate the wrapper trains as the bare optimizer and still makes records."""
    bare_model, model = make_model(), make_model()
    accelerator = Accelerator(cpu=True)
    bare_prepared = accelerator.prepare(bare_model, torch.optim.AdamW(bare_model.parameters()))
    with MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, **QUIET) as wrapped:
        prepared_model, prepared = accelerator.prepare(model, wrapped)
        assert train(prepared_model, prepared) == train(*bare_prepared)
        assert len(wrapped.tracer.history) == 4
    assert_same_weights(model, bare_model)


def test_pickle_and_copies_give_the_bare_optimizer() -> None:
    """A copy has no model to trace: it is the optimizer itself, with its state."""
    model = make_model()
    with MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, **QUIET) as wrapped:
        train(model, wrapped)
        for restored in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)):
            assert type(restored) is torch.optim.AdamW
            assert len(restored.state) == len(wrapped.state)
            restored.step()


def test_hooks_of_the_user_run_once() -> None:
    """Hooks registered on the wrapper run once a step and get what they were registered on."""
    model = make_model()
    inner = torch.optim.AdamW(model.parameters())
    seen = []
    with MemTraceOptimizer(inner, model, **QUIET) as wrapped:
        handle = wrapped.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
        wrapped.register_state_dict_post_hook(lambda optimizer, state: {**state, "extra": 1})
        train(model, wrapped, steps=2)
        assert seen == [wrapped, wrapped]
        handle.remove()
        train(model, wrapped, steps=1)
        assert len(seen) == 2
        assert wrapped.state_dict()["extra"] == 1


def test_closing_twice_leaves_a_working_optimizer() -> None:
    """After `close()` the wrapper trains on without records."""
    model = make_model()
    wrapped = MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, **QUIET)
    train(model, wrapped, steps=2)
    wrapped.close()
    wrapped.close()
    train(model, wrapped, steps=2)
    assert len(wrapped.tracer.history) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prot": 1}, "unknown setting 'prot': did you mean 'port'"),
        ({"port": 70000}, "port must be 0..65535, got 70000"),
        ({"trace_every": -1}, "trace_every must be 0.."),
        ({"run_name": "  "}, "run_name must be a text"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    """A wrong setting is one clear error, and nothing is left attached."""
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, **settings)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "container", [list, tuple, lambda several: dict(enumerate(several))], ids=["list", "tuple", "dict"]
)
def test_a_tracer_takes_several_optimizers(container) -> None:
    """In a list, a tuple or a dictionary: a step ends when all have stepped, and the state of all is counted."""
    model = make_model()
    several = [torch.optim.AdamW(layer.parameters()) for layer in (model[0], model[2])]
    with MemoryTracer(model, container(several), TracerConfig(trace_every=1, **QUIET)) as tracer:
        for _ in range(2):
            model(torch.randn(4, 8)).square().mean().backward()
            for optimizer in several:
                optimizer.step()
                optimizer.zero_grad()
        assert [record.step for record in tracer.history] == [1, 2]
        state = tracer.latest.moments[Moment.STEP_END][Category.OPTIMIZER_STATE]
        assert state == sum(2 * parameter.nbytes + 4 for parameter in model.parameters())


def test_optimizer_of_another_model_is_refused() -> None:
    """The error says whose parameters were expected."""
    with pytest.raises(ConfigError, match="none of its 4 parameters belongs to the given Sequential"):
        MemTraceOptimizer(torch.optim.AdamW(make_model().parameters()), make_model(), **QUIET)


def test_model_without_parameters_is_refused() -> None:
    """There is nothing to trace in it."""
    optimizer = torch.optim.AdamW(make_model().parameters())
    with pytest.raises(ConfigError, match="must have parameters, got a Tanh without any"):
        MemTraceOptimizer(optimizer, nn.Tanh(), **QUIET)


def test_unwritable_log_directory_is_refused_before_training(tmp_path) -> None:
    """A log directory below a file cannot be made: one error, and no hook is left."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    model = make_model()
    with pytest.raises(OutputError, match="log"):
        MemTraceOptimizer(torch.optim.AdamW(model.parameters()), model, port=None, log_dir=blocker / "logs")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks

"""Law 8 beside users of torch's own machinery, between steps and inside them.

It works as without memtrace, the training is the same to the bit, and memtrace is still up.
"""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from laws.life import Perceptron
from nothing_left import recorders_of_torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.config import TracerConfig
from memtrace.tracing.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}
CONFIGS = {"traced": TracerConfig(**QUIET, trace_every=1), "counted": TracerConfig(**QUIET, trace_every=0)}


class Training:
    """A small training that somebody uses torch beside."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Perceptron()
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def rows(self) -> torch.Tensor:
        return torch.randn(4, 16)

    def loss(self) -> torch.Tensor:
        return self.model(self.rows()).square().mean()

    def end(self, loss: torch.Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def step(self) -> float:
        return self.end(self.loss())

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def vmap(training: Training) -> torch.Tensor:
    return torch.vmap(training.model)(torch.randn(3, 2, 16))


def functional_call(training: Training) -> torch.Tensor:
    return torch.func.functional_call(training.model, training.parameters(), (training.rows(),))


def functional_call_on_copies(training: Training) -> torch.Tensor:
    doubled = {name: parameter * 2 for name, parameter in training.parameters().items()}
    return torch.func.functional_call(training.model, doubled, (training.rows(),))


def ensemble(training: Training) -> torch.Tensor:
    stacked = {name: torch.stack([p, p * 2]) for name, p in training.parameters().items()}
    call = partial(torch.func.functional_call, training.model)
    return torch.vmap(call, in_dims=(0, None))(stacked, (training.rows(),))


def forward_derivative(training: Training) -> torch.Tensor:
    rows = training.rows()
    return torch.func.jvp(training.model, (rows,), (torch.ones_like(rows),))[1]


def exported(training: Training) -> torch.Tensor:
    program = torch.export.export(training.model, (training.rows(),))
    return program.module()(training.rows())


def traced_by_jit(training: Training) -> torch.Tensor:
    return torch.jit.trace(training.model, training.rows(), check_trace=False)(training.rows())


def scripted(training: Training) -> torch.Tensor:
    return torch.jit.script(training.model)(training.rows())


def scripted_inside_another(training: Training) -> torch.Tensor:
    return torch.jit.script(nn.Sequential(training.model))(training.rows())


def scripted_copy(training: Training) -> torch.Tensor:
    return torch.jit.script(copy.deepcopy(training.model).eval())(training.rows())


def deep_copied(training: Training) -> torch.Tensor:
    other = copy.deepcopy(training.model)
    result = other(training.rows())
    result.sum().backward()
    return result


def optimizer_deep_copied(training: Training) -> torch.Tensor:
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    model(training.rows()).sum().backward()
    optimizer.step()
    return next(model.parameters())


def state_loaded(training: Training) -> torch.Tensor:
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    return training.rows()


def gradients_with_respect_to_the_input(training: Training) -> torch.Tensor:
    rows = training.rows().requires_grad_()
    return torch.autograd.grad(training.model(rows).sum(), rows)[0]


def anomaly_mode(training: Training) -> torch.Tensor:
    with torch.autograd.detect_anomaly(check_nan=True):
        return torch.tensor(training.step())


def checkpointed(training: Training, use_reentrant: bool) -> torch.Tensor:
    rows = training.rows().requires_grad_()
    loss = checkpoint(training.model, rows, use_reentrant=use_reentrant).square().mean()
    return torch.tensor(training.end(loss))


def hooks_of_the_user(training: Training) -> torch.Tensor:
    packed: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.numel())
        return tensor.detach().clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.end(training.loss())
    return torch.tensor([loss, *packed])


def saved_on_the_cpu(training: Training) -> torch.Tensor:
    with save_on_cpu():
        loss = training.loss()
    return torch.tensor(training.end(loss))


def saved_tensor_hooks_forbidden(training: Training) -> torch.Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden by the user"):
        return torch.tensor(training.step())


def compiled_whole(training: Training) -> torch.Tensor:
    """A caller compiled with fullgraph=True: the model is inside its graph."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return training.model(rows).square().mean()

    return torch.tensor([training.end(loss_of(training.rows())) for _ in range(3)])


def inference_mode(training: Training) -> torch.Tensor:
    with torch.inference_mode():
        return training.model(training.rows()).clone()


def swapped_parameters(training: Training) -> torch.Tensor:
    """An exponential average is put in the place of the weights for an evaluation, and taken out again."""
    kept = {name: p.clone() for name, p in training.parameters().items()}
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.mul_(0.5)
        result = training.model(training.rows())
    training.model.load_state_dict(kept)
    return result


def swapped_tensors(training: Training) -> torch.Tensor:
    """Other tensors become the parameters, which stay the same objects: torch refuses where weak references are."""
    before = [*map(id, training.model.parameters())]
    for parameter in training.model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 0.5))
    assert [*map(id, training.model.parameters())] == before
    return training.model(training.rows())


BETWEEN: tuple[Callable[[Training], torch.Tensor], ...] = (
    vmap,
    functional_call,
    functional_call_on_copies,
    ensemble,
    forward_derivative,
    exported,
    traced_by_jit,
    scripted,
    scripted_inside_another,
    scripted_copy,
    deep_copied,
    optimizer_deep_copied,
    state_loaded,
    gradients_with_respect_to_the_input,
    inference_mode,
    swapped_parameters,
    swapped_tensors,
)
"""What is done between two steps, and once more between the forward and the backward pass of one."""

WHOLE_STEPS: tuple[Callable[[Training], torch.Tensor], ...] = (
    anomaly_mode,
    partial(checkpointed, use_reentrant=True),
    partial(checkpointed, use_reentrant=False),
    hooks_of_the_user,
    saved_on_the_cpu,
    saved_tensor_hooks_forbidden,
    compiled_whole,
)
"""What contains whole steps."""

CHANGES_WEIGHTS_INSIDE_A_STEP = (state_loaded, swapped_parameters, swapped_tensors)


def name_of(used: Any) -> str:
    return used.__name__ if not isinstance(used, partial) else f"{used.func.__name__}-{used.keywords}"


def between(use: Callable[[Training], torch.Tensor], training: Training) -> list[Any]:
    found: list[Any] = [training.step(), training.step(), use(training), training.step()]
    if use not in CHANGES_WEIGHTS_INSIDE_A_STEP:  # there, bare torch raises
        loss = training.loss()
        found += [use(training), training.end(loss)]
    return [*found, training.step()]


def whole_steps(use: Callable[[Training], torch.Tensor], training: Training) -> list[Any]:
    return [training.step(), training.step(), use(training), training.step(), use(training), training.step()]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a loop has found, its weights last, what was warned of, and the tracer that watched it."""

    found: list[Any]
    warned: set[str]
    tracer: Tracer | None


def run(loop: Callable[[Training], list[Any]], config: TracerConfig | None) -> Outcome:
    training = Training()
    watch: AbstractContextManager[Tracer | None] = (
        nullcontext() if config is None else Tracer(training.model, training.optimizer, config)
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with watch as tracer:
            found = loop(training)
            assert recorders_of_torch() == {}
    values = [value.tolist() if isinstance(value, torch.Tensor) else value for value in found]
    weights = [parameter.tolist() for parameter in training.model.parameters()]
    return Outcome([*values, *weights], {str(warning.message) for warning in warned}, tracer)


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize(
    "loop",
    [partial(between, use) for use in BETWEEN] + [partial(whole_steps, use) for use in WHOLE_STEPS],
    ids=lambda loop: name_of(loop.args[0]),
)
def test_it_works_as_without_memtrace(loop: Callable[[Training], list[Any]], settings: str) -> None:
    """Results, losses and weights are the same; the tracer is up and has seen the last step."""
    bare, watched = run(loop, None), run(loop, CONFIGS[settings])
    assert watched.found == bare.found
    assert watched.warned <= bare.warned
    tracer = watched.tracer
    assert tracer is not None
    assert tracer.snapshot().up
    assert tracer.snapshot().totals.steps >= len(tracer.history) >= 4
    assert tracer.history[-1].traced == (settings == "traced")


@pytest.mark.parametrize("ways", [torch.cuda, torch.cuda.graphs])
def test_graphed_callables_meet_no_hooks(ways: Any) -> None:
    """torch takes no module with hooks there. Without a device it comes as far as without memtrace; hooks are back."""
    model, sample = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), torch.ones(4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def capture() -> str:
        with pytest.raises((AssertionError, RuntimeError)) as refused:
            ways.make_graphed_callables(model, (sample,))
        return str(refused.value)

    bare = capture()
    assert "hooks" not in bare
    with Tracer(model, optimizer, CONFIGS["traced"]) as tracer:
        for _ in range(3):
            assert capture() == bare
            model(sample).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model._forward_hooks
    assert [record.traced for record in tracer.history] == [True] * 3
    assert capture() == bare


@pytest.mark.gpu
@pytest.mark.parametrize("attached_before", [True, False])
@pytest.mark.parametrize("settings", CONFIGS)
def test_graphed_callables(settings: str, attached_before: bool) -> None:
    """A model whose passes CUDA graphs have captured trains the same, with memtrace attached before or after."""

    def train(config: TracerConfig | None) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sample = torch.randn(4, 16, device="cuda")
        graphed: Any = model if attached_before else torch.cuda.make_graphed_callables(model, (sample,))
        with nullcontext() if config is None else Tracer(model, optimizer, config) as tracer:
            if attached_before:
                graphed = torch.cuda.make_graphed_callables(model, (sample,))
            losses = []
            for _ in range(4):
                loss = F.mse_loss(graphed(sample), sample)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                losses.append(loss.item())
        assert tracer is None or tracer.snapshot().up
        return losses

    assert train(CONFIGS[settings]) == train(None)


PROFILED = """
import json, os, signal, sys, tempfile
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from memtrace import MemoryTracer, MemTraceCallback, TracerConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

torch.optim.AdamW([nn.Parameter(torch.ones(1))])
statuses = {}
for way in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        break
    statuses[way] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
else:
    print(json.dumps(statuses))
    os._exit(0)

signal.alarm(100)  # a child that hangs ends by this
sys.stderr = open(os.devnull, "w")
how, first, every = way.split()
settings = {"port": None, "step_log": False, "oom_reports": 0, "device_poll_seconds": 0}
settings |= {"trace_every": 1} if every == "traced" else {}
seen = []
user = profile(
    activities=[ProfilerActivity.CPU],
    schedule=schedule(wait=1, warmup=1, active=2),
    on_trace_ready=lambda done: seen.append(len(done.events())),
)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, labels=None):
        return {"loss": self.layer(x).square().mean()}

model = Net()
if how == "loop":
    optimizer = torch.optim.AdamW(model.parameters())
    tracer = MemoryTracer(model, optimizer, TracerConfig(**settings))
    if first == "memtrace":
        tracer.attach()
        user.start()
    else:
        user.start()
        tracer.attach()
    for _ in range(8):
        model(torch.ones(2, 8))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        user.step()
    if first == "memtrace":
        user.stop()
        tracer.detach()
    else:
        tracer.detach()
        user.stop()
else:
    class Steps(TrainerCallback):
        def on_step_end(self, *_, **__):
            user.step()

    callbacks = [MemTraceCallback(**settings), Steps()]
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=8, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no", use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"x": torch.ones(8), "labels": 0}] * 32,
        callbacks=callbacks if first == "memtrace" else callbacks[::-1],
    )
    with user:
        trainer.train()
    tracer = callbacks[0].tracer
assert len(seen) == 2 and min(seen) > 0, seen
assert tracer.snapshot().up and tracer.snapshot().totals.steps == 8
"""


def test_a_profiler_of_the_user_with_a_schedule() -> None:
    """Beside memtrace in a loop and under Trainer, whichever came first: both go on to the end."""
    ways = ["loop memtrace default", "loop user traced", "trainer memtrace traced", "trainer user default"]
    done = subprocess.run(
        [sys.executable, "-c", PROFILED, json.dumps(ways)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(ways, 0)


def test_a_model_that_holds_its_tracer_is_copied_and_saved() -> None:
    """A copy has the same tracer and is not watched; a file has None in its place."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.tracer = tracer = Tracer(model, optimizer, CONFIGS["traced"])
    saved = io.BytesIO()
    with tracer:
        loss = model(torch.ones(2, 4)).sum()
        average = copy.deepcopy(model)
        torch.save(model, saved)
        loss.backward()
        optimizer.step()
        average(torch.ones(2, 4)).sum().backward()
    assert [record.traced for record in tracer.history] == [True]
    assert average.tracer is copy.copy(tracer) is tracer
    assert not average._forward_hooks
    saved.seek(0)
    assert torch.load(saved, weights_only=False).tracer is None

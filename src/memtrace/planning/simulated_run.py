"""Two training steps on tensors without memory; the second one is looked at as the live tracer looks at a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memtrace.attribution.garbage import only_new_garbage, uncollected
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.errors import MemTraceError, PlanError
from memtrace.planning.by_module import Makers
from memtrace.planning.held_types import hold_as
from memtrace.planning.optimizers.simulated import KeptStates
from memtrace.planning.optimizers.updates import MakeOptimizer, Updates
from memtrace.planning.recipe import Recipe, under_deepspeed
from memtrace.planning.sharding.one_rank import OneRank, check_sharding
from memtrace.planning.sharding.shares import Sharding
from memtrace.planning.step_recorder import StepRecorder
from memtrace.record.breakdown import BatchShape, Breakdown
from memtrace.record.categories import Moment
from memtrace.simulation import torch_fake
from memtrace.simulation.cuda_functions import CudaFunctions
from memtrace.simulation.kernels import Target
from memtrace.simulation.mode import Simulation
from memtrace.simulation.models.outputs import Outputs
from memtrace.simulation.models.quantized import parameter_count
from memtrace.simulation.operator_results import OperatorResults, map_tensors
from memtrace.simulation.results import Operator
from memtrace.simulation.tensor import DEVICE
from memtrace.sources.cuda import cublas
from memtrace.sources.events import Event

Loss = Callable[..., torch.Tensor]
"""Returns the loss for a model and a batch; further models are handed over by name."""

WORKSPACES = cublas.of_both_threads(cublas.BEFORE_HOPPER)
"""What cuBLAS keeps of a device that is not named."""

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What model code raises for a configuration or a batch that it cannot use, and for files that are not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a simulated step is made from."""

    make_model: Callable[[], nn.Module]
    """Called once, with the meta device as the default."""
    make_batch: Callable[[], Any]
    """Called for each micro batch; tensors on a CPU or on the meta device."""
    loss: Loss
    recipe: Recipe
    make_optimizer: MakeOptimizer
    accumulation_steps: int
    target: Target
    sharding: Sharding = field(default_factory=Sharding)
    further: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """Make the models beside the trained one, by name, as `make_model` does; their types are left as they are."""
    keeps_outputs: bool = False
    """Whether the loop names the output of the model, and so keeps its logits into the next step."""
    workspaces: Sequence[int] = WORKSPACES
    """Sizes of the blocks that cuBLAS keeps, in bytes; a CPU has none."""
    results: OperatorResults | None = None
    """What earlier runs for this target have learned of operators."""
    by_module: bool = True
    """Whether it is noted when each module runs, which takes a tenth of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What happened in two steps."""

    moments: Mapping[Moment, Breakdown]
    """Of the second step."""
    timeline: Timeline
    """From before the model was made to the end of the second step: all its blocks begin within."""
    marks: StepMarks
    """When the second step entered its parts."""
    makers: Makers
    """Which module made a block; none where it was not noted."""
    owners: Mapping[int, str]
    """The module of the parameter that a block is kept for, by address, where it was noted."""
    parameters: int
    trainable: int
    batch: BatchShape | None
    output_bytes: int
    """Of what the model returned besides its loss."""
    further_output_bytes: Mapping[str, int]
    """Of what each further model returned that ran, by name."""
    host_bytes: int
    """What is in the memory of the host after the step: offloaded and paged states, and what stands between."""
    operators: int
    """Operators that the two steps took."""
    kinds: frozenset[Operator]
    """Which they were."""

    def events(self) -> list[Event]:
        """Returns every allocation and free, in order."""
        changes: dict[int, Event] = {}
        for life in self.timeline.lifetimes:
            changes[life.begin] = Event(life.begin_ns, life.address, life.nbytes)
            if life.end is not None:
                changes[life.end] = Event(self.timeline.change_ns[life.end], life.address, -life.nbytes)
        return [changes[position] for position in sorted(changes)]


def run_two_steps(training: Training) -> SimulatedRun:
    """Runs two steps and returns what happened; the random state of the caller is left as it is.

    Raises:
        PlanError: the model cannot be made, refuses the batch, or does what cannot be simulated.
    """
    check_sharding(training.recipe, training.sharding)
    if training.sharding.is_zero:
        training = replace(training, recipe=under_deepspeed(training.recipe))
    try:
        with uncollected(), only_new_garbage():
            return _run(training)
    finally:
        torch_fake.collect_storages()


def _run(training: Training) -> SimulatedRun:
    simulation = Simulation(training.target, training.results)
    simulation.events.open()
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        further = _further_of(training)
        model = _model_of(training, further)
        for module in (model, *further.values()):
            simulation.adopt_module(module)
        stack.enter_context(simulation)
        if training.target is Target.CUDA:
            stack.enter_context(CudaFunctions())
            for nbytes in training.workspaces:
                simulation.events.allocate(nbytes)
        parameters = parameter_count(model)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rank = OneRank(
            recipe=training.recipe,
            sharding=training.sharding,
            target=training.target,
            make_optimizer=training.make_optimizer,
            stack=stack,
        )
        with refusals("the model cannot be sharded"):
            model = rank.model(model)
        with refusals("the optimizer cannot be made"):
            updates = rank.updates(model, simulation)
        stack.callback(updates.close)
        with refusals("a further model cannot be sharded"):
            further = {name: rank.further_model(module, updates) for name, module in further.items()}
        outputs = Outputs(keeps=training.keeps_outputs)
        stack.callback(model.register_forward_hook(outputs.saw).remove)
        beside = {name: Outputs(keeps=training.keeps_outputs, trained=False) for name in further}
        for name, module in further.items():
            stack.callback(module.register_forward_hook(beside[name].saw).remove)
        loss = partial(training.loss, **further) if further else training.loss
        training = replace(training, loss=loss)
        workspaces = training.workspaces if training.target is Target.CUDA else ()
        with StepRecorder(
            model, updates, simulation, workspaces, FurtherModels(further), by_module=training.by_module
        ) as recorder:
            _step(training, model, updates, simulation)
            recorder.ready = True
            _step(training, model, updates, simulation)
            recorder.step_is_over()
            host_bytes = simulation.host_bytes
            if isinstance(updates.optimizer, KeptStates):
                host_bytes += updates.optimizer.paged_bytes
    if recorder.timeline is None or recorder.marks is None:
        raise PlanError("the loss never ran the model: it must call the module that it is given")
    return SimulatedRun(
        moments=recorder.timeline.moments(recorder.marks),
        timeline=recorder.timeline,
        marks=recorder.marks,
        makers=Makers(recorder.modules.spans, simulation.events.nodes),
        owners=recorder.owners.modules,
        parameters=parameters,
        trainable=trainable,
        batch=recorder.batch,
        output_bytes=outputs.nbytes,
        further_output_bytes={name: seen.nbytes for name, seen in beside.items() if seen.nbytes},
        host_bytes=host_bytes,
        operators=simulation.operators,
        kinds=frozenset(simulation.kinds),
    )


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turns what model code raises about what it was given into a PlanError that begins with `what`."""
    try:
        yield
    except MemTraceError:
        raise
    except _REFUSALS as error:
        text = str(error).strip() or "without a message"
        raise PlanError(f"{what}: {type(error).__name__}: {text}") from error


def _model_of(training: Training, further: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the model on the meta device, its parameters in the types of the recipe."""
    with refusals("the model cannot be made"), torch.device("meta"):
        model = training.make_model()
    if not isinstance(model, nn.Module):
        raise PlanError(f"make_model must return a torch.nn.Module, got {type(model).__name__}")
    if any(map(_has_lazy, (model, *further.values()))):
        _give_shapes(training, model, further)
    hold_as(model, training.recipe, training.sharding)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(f"the model must have parameters that are trained, got a {type(model).__name__} without any")
    return model.train()


def _has_lazy(module: nn.Module) -> bool:
    return any(map(is_lazy, (*module.parameters(), *module.buffers())))


def _give_shapes(training: Training, model: nn.Module, further: Mapping[str, nn.Module]) -> None:
    """Gives the parameters of lazy modules their shapes, by a forward pass on the meta device, as training does.

    Raises:
        PlanError: the forward pass fails there, or does not call all of them.
    """
    with refusals("lazy modules cannot be given their shapes"), torch.device("meta"), torch.no_grad():
        training.loss(model, map_tensors(lambda tensor: tensor.to("meta"), training.make_batch()), **further)
    if any(map(_has_lazy, (model, *further.values()))):
        raise PlanError("a lazy module has no shape after a forward pass: make_model must return it without, or use it")


def _further_of(training: Training) -> dict[str, nn.Module]:
    """Returns the further models on the meta device.

    Raises:
        PlanError: one cannot be made.
    """
    made = {}
    for name, make in training.further.items():
        with refusals(f"{name} cannot be made"), torch.device("meta"):
            made[name] = make()
        if not isinstance(made[name], nn.Module):
            raise PlanError(f"{name} must be made as a torch.nn.Module, got {type(made[name]).__name__}")
    return made


def _step(training: Training, model: nn.Module, updates: Updates, simulation: Simulation) -> None:
    for micro in range(training.accumulation_steps):
        gc.collect()  # here and at no other time: the same plan is the same bytes, whatever the process did before
        updates.micro_batch_begins(last=micro == training.accumulation_steps - 1)
        with refusals("the batch cannot be made"):
            batch = map_tensors(simulation.adopt, training.make_batch())
        with refusals("the model refused the batch"):
            with _precision(training.recipe):
                loss = training.loss(model, batch)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise PlanError(f"the loss must be one number in a tensor, got {loss!r}")
            torch.autograd.backward(loss)
            updates.micro_batch_ends()
        del batch, loss
    with refusals("the optimizer refused its step"), simulation.guessing():
        updates.step()
        updates.zero_grad()


def _precision(recipe: Recipe) -> AbstractContextManager[object]:
    if not recipe.casts:
        return nullcontext()
    return torch.autocast(DEVICE.type, getattr(torch, recipe.compute))

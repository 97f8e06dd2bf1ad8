"""Two training steps on tensors without memory; the second one is looked at as the live tracer looks at a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from memtrace.attribution.engines.engine import Engine
from memtrace.attribution.inputs import claim_batch, main_input
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.attribution.timeline import StepMarks, Timeline
from memtrace.breakdown import BatchShape, Breakdown
from memtrace.categories import Moment
from memtrace.errors import MemTraceError, PlanError
from memtrace.guard import Guard
from memtrace.planning.by_module import ModuleSpans, Span
from memtrace.planning.held_types import hold_as
from memtrace.planning.outputs import Outputs
from memtrace.planning.quantized import parameter_count
from memtrace.planning.recipe import Recipe, under_deepspeed
from memtrace.planning.sharding import Offload, Sharding, Strategy
from memtrace.planning.updates import MakeOptimizer, Updates, updates_of
from memtrace.sources import cublas
from memtrace.sources.cuda_functions import CudaFunctions
from memtrace.sources.events import Event
from memtrace.sources.hooks import HookSet
from memtrace.sources.kernels import Target
from memtrace.sources.operator_results import OperatorResults, map_tensors
from memtrace.sources.results import Operator
from memtrace.sources.simulated_tensor import DEVICE
from memtrace.sources.simulation import Simulation
from memtrace.steps import StepInFlight
from memtrace.tracing import TraceWindow

Loss = Callable[[nn.Module, Any], torch.Tensor]

WORKSPACES = cublas.of_both_threads(cublas.BEFORE_HOPPER)
"""What cuBLAS keeps of a device that is not named."""

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What model code raises for a configuration or a batch that it cannot use."""


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
    spans: Sequence[Span]
    """When each module ran in the second step, where it was noted."""
    parameters: int
    trainable: int
    batch: BatchShape | None
    output_bytes: int
    """Of what the model returned besides its loss."""
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
    _check_sharding(training)
    if training.sharding.is_zero:
        training = replace(training, recipe=under_deepspeed(training.recipe))
    simulation = Simulation(training.target, training.results)
    simulation.events.open()
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        model = _model_of(training)
        simulation.adopt_module(model)
        stack.enter_context(simulation)
        if training.target is Target.CUDA:
            stack.enter_context(CudaFunctions())
            for nbytes in training.workspaces:
                simulation.events.allocate(nbytes)
        parameters = parameter_count(model)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with refusals("the model cannot be sharded"):
            model = _sharded(model, training, stack)
        with refusals("the optimizer cannot be made"):
            updates = _updates(model, training, stack)
        stack.callback(updates.close)
        outputs = Outputs(keeps=training.keeps_outputs)
        stack.callback(model.register_forward_hook(outputs.saw).remove)
        workspaces = training.workspaces if training.target is Target.CUDA else ()
        with _Recorder(model, updates, simulation, workspaces, by_module=training.by_module) as recorder:
            _step(training, model, updates, simulation)
            recorder.ready = True
            _step(training, model, updates, simulation)
            recorder.step_is_over()
    if recorder.timeline is None or recorder.marks is None:
        raise PlanError("the loss never ran the model: it must call the module that it is given")
    return SimulatedRun(
        moments=recorder.timeline.moments(recorder.marks),
        timeline=recorder.timeline,
        marks=recorder.marks,
        spans=recorder.modules.spans,
        parameters=parameters,
        trainable=trainable,
        batch=recorder.batch,
        output_bytes=outputs.nbytes,
        operators=simulation.operators,
        kinds=frozenset(simulation.kinds),
    )


class _Recorder:
    """Marks the parts of a step and tags its blocks, through the hooks that the live tracer uses."""

    def __init__(
        self,
        model: nn.Module,
        updates: Updates,
        simulation: Simulation,
        workspaces: Sequence[int],
        *,
        by_module: bool,
    ) -> None:
        self.ready = False
        """Whether the next step is the one to look at."""
        self.timeline: Timeline | None = None
        self.marks: StepMarks | None = None
        self.batch: BatchShape | None = None
        self._model, self._optimizer = model, updates.optimizer
        self.modules, self._by_module = ModuleSpans(simulation.events.coordinates.now_ns), by_module
        self._clock = simulation.events.coordinates.now_ns
        self._ledger = Ledger(DEVICE, simulation.events.coordinates)
        self._step: StepInFlight | None = None
        self._hooks = HookSet()
        engines = [updates] if isinstance(updates, Engine) else []
        self._scan = Scan(model, updates.optimizer, engines)
        self._scan.workspaces = workspaces
        self._window = TraceWindow(
            model=model,
            scan=self._scan,
            source=simulation.events,
            ledger=self._ledger,
            guard=Guard(lambda: None, strict=True),
            current_step=lambda: self._step,
        )

    def __enter__(self) -> Self:
        self._window.adopt()
        if self._by_module:
            self.modules.watch(self._model, self._hooks)
        self._hooks.before_forward(self._model, self._forward_begins)
        self._hooks.after_forward(self._model, self._forward_ends)
        self._hooks.around_step(self._optimizer, self._optimizer_begins, self._optimizer_ends)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._window.abandon()

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.ready or not torch.is_grad_enabled():
            return
        if self._step is None:
            self._step = StepInFlight(
                number=2,
                read=lambda: None,
                now_ns=self._clock,
                prepares_gradients=self._scan.prepares_gradients,
            )
        self._step.forward_begins(main_input(args, kwargs, getattr(module, "main_input_name", None)))
        claim_batch(args, kwargs, self._ledger)
        self._window.forward_begins()

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._step is not None and torch.is_grad_enabled():
            self._step.forward_ends()
            self._window.forward_ends(output)

    def _optimizer_begins(self, *_: object) -> None:
        if self._step is not None:
            self._step.optimizer_begins()
            self._window.backward_ends()

    def _optimizer_ends(self, *_: object) -> None:
        """A step without an engine ends here, as for the live tracer: nobody knows whether gradients are kept."""
        if self._step is None:
            return
        self._step.optimizer_ends()
        if not self._scan.engines:
            self.step_is_over()

    def step_is_over(self) -> None:
        """Ends the step that is looked at; nothing where it is over."""
        if self._step is None or not self._step.stepped:
            return
        self.marks, self.batch = self._step.ends(), self._step.batch()
        self.timeline = self._window.close()
        self._step = None
        assert self.timeline is not None, "a simulation loses no events"


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


def _model_of(training: Training) -> nn.Module:
    """Returns the model on the meta device, its parameters in the types of the recipe."""
    with refusals("the model cannot be made"), torch.device("meta"):
        model = training.make_model()
    if not isinstance(model, nn.Module):
        raise PlanError(f"make_model must return a torch.nn.Module, got {type(model).__name__}")
    hold_as(model, training.recipe, training.sharding)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(f"the model must have parameters that are trained, got a {type(model).__name__} without any")
    return model.train()


def _check_sharding(training: Training) -> None:
    sharding, recipe = training.sharding, training.recipe
    if sharding.offload is not Offload.NONE:
        raise PlanError("offloading is not simulated: plan it by formula, from --params")
    if sharding.strategy not in (Strategy.NONE, Strategy.FSDP) and recipe.gradients_persist:
        raise PlanError(f"{sharding.strategy.label} with the recipe {recipe.name} is not simulated")
    if sharding.strategy is Strategy.DDP and recipe.master is not None:
        raise PlanError(
            f"DDP with the recipe {recipe.name} is not simulated: masters come from DeepSpeed, which is --zero 0"
        )


def _sharded(model: nn.Module, training: Training, stack: ExitStack) -> nn.Module:
    """Returns the model as one rank holds it, where the real engine can shard it."""
    sharding = training.sharding
    if sharding.strategy is not Strategy.FSDP:
        return model
    from memtrace.planning.sharded_updates import fully_sharded  # noqa: PLC0415 - torch.distributed takes a second
    from memtrace.sources.fake_ranks import fake_ranks  # noqa: PLC0415

    stack.enter_context(fake_ranks(sharding.rank, sharding.world_size))
    return fully_sharded(model, training.recipe, sharding)


def _updates(model: nn.Module, training: Training, stack: ExitStack) -> Updates:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sharding, make = training.sharding, training.make_optimizer
    if sharding.strategy is Strategy.NONE:
        return updates_of(training.recipe, trainable, make)
    if sharding.strategy is Strategy.FSDP:
        return Updates(trainable, make)
    if sharding.strategy is Strategy.DDP:
        from memtrace.planning.sharded_updates import DdpUpdates  # noqa: PLC0415 - torch.distributed takes a second

        return DdpUpdates(trainable, make, gradients_are_views=sharding.gradient_as_bucket_view)
    from memtrace.planning.zero3_modules import ZeroFunctions  # noqa: PLC0415
    from memtrace.planning.zero3_updates import Zero3Updates  # noqa: PLC0415
    from memtrace.planning.zero_updates import Zero0Updates, ZeroUpdates  # noqa: PLC0415

    if sharding.strategy is Strategy.ZERO3:
        updates = Zero3Updates(model, make, sharding, training.target)
        stack.enter_context(ZeroFunctions(updates.fetching))
        return updates
    if sharding.strategy is Strategy.ZERO0:
        return Zero0Updates(trainable, make, sharding)
    return ZeroUpdates(trainable, make, sharding)


def _step(training: Training, model: nn.Module, updates: Updates, simulation: Simulation) -> None:
    for micro in range(training.accumulation_steps):
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

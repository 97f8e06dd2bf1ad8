"""Which operators the unclaimed bytes come from: unattributed and temporaries, named one by one.

The same step is run twice from the same seed: once recorded from birth, once under torch's own profiler with its
operators. What the two allocate is the same, in the same order, so that each block of the first run has its operator
in the second.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from laws.birth import run_from_birth
from laws.families import FAMILIES, Combination, Recipe, Way
from laws.loop import Loop
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaModel

from memtrace.attribution.timeline import Lifetime, StepMarks, Timeline
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment, Phase
from memtrace.sources.autograd_torch_private import tells_of_nodes

NO_OPERATOR = "(a copy of the random number generator's state)"
BACKWARD = "a node of the backward pass"
OPTIMIZER = "Optimizer.step#AdamW.step"
LOSS = "aten::cross_entropy_loss"
LOGITS = "aten::linear"
SEED = "aten::ones_like"
"""The gradient of the loss with respect to itself, before backward has asked for anything."""

ROWS = [
    ("llama-gqa", Recipe.FP32, Way.PLAIN),
    ("llama-gqa", Recipe.BF16, Way.ACCUMULATION),
    ("llama-gqa", Recipe.AUTOCAST, Way.PLAIN),
    ("llama-gqa", Recipe.BF16_MASTER, Way.PLAIN),
    ("llama-gqa", Recipe.FP32, Way.REENTRANT),
    ("llama-gqa", Recipe.AUTOCAST, Way.NON_REENTRANT),
    ("mixtral", Recipe.FP32, Way.PLAIN),
    ("mamba", Recipe.FP32, Way.PLAIN),
    ("convnet", Recipe.FP32, Way.PLAIN),
    ("lstm", Recipe.FP32, Way.PLAIN),
]


def by_name_to_layers() -> set[str]:
    """Returns the operators of what Llama gives its layers by name, which a checkpoint keeps and does not save.

    Positions for rotary embeddings; before transformers 5 also a mask; before 4.52 all of it goes by position, which a
    checkpoint saves as activations.
    """
    if importlib.util.find_spec("transformers.modeling_layers") is None:
        return set()
    adds = ") + past_seen_tokens" in inspect.getsource(LlamaModel.forward)
    return {"aten::add"} if adds else {"aten::arange", "aten::__and__"}


LEFT_BY_THE_FORWARD_PASS = {
    Way.PLAIN: {LOGITS, LOSS},
    Way.ACCUMULATION: {LOGITS, LOSS},
    # For each layer also the state of the random number generator.
    Way.REENTRANT: {LOGITS, LOSS, *by_name_to_layers(), "CheckpointFunction"},
    Way.NON_REENTRANT: {LOGITS, LOSS, *by_name_to_layers(), "aten::mul", NO_OPERATOR},
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """One allocation as torch's profiler tells it: its size, and the operators around it, outermost first."""

    nbytes: int
    operators: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The outermost operator, without the details that differ between models."""
        outermost = self.operators[0] if self.operators else NO_OPERATOR
        return BACKWARD if outermost.startswith("autograd::engine::evaluate_function") else outermost


@dataclass(frozen=True, slots=True)
class NamedStep:
    """A step whose blocks are matched with operators."""

    timeline: Timeline
    marks: StepMarks
    blocks: list[tuple[Lifetime, Allocation]]
    unclaimed: dict[Moment, int]
    """Of blocks that the step made."""

    def nobodys(self, moment: Moment) -> list[tuple[Lifetime, Allocation]]:
        """The blocks without a tag that are live at a moment."""
        first, last = self.timeline.position(self.marks.begin_ns), self.timeline.position(self.marks.end_ns)
        times = {Moment.FORWARD_END: self.marks.forward_end_ns, Moment.STEP_END: self.marks.end_ns}
        at = (
            max(range(first, last + 1), key=self.timeline.totals.__getitem__)
            if moment is Moment.PEAK
            else self.timeline.position(times[moment] or 0)
        )
        return [
            (life, allocation)
            for life, allocation in self.blocks
            if life.tag is None and life.begin < at and (life.end is None or life.end >= at)
        ]


def profiled_allocations(combination: Combination) -> list[Allocation]:
    """Runs two steps from the same seed and returns the allocations of the second, as torch's profiler saw them."""
    torch.manual_seed(0)
    loop = Loop(combination)
    loop.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.step()
    kinds = torch._C._profiler._EventType
    found: list[tuple[int, Allocation]] = []

    def walk(node: object, operators: tuple[str, ...]) -> None:
        if node.tag == kinds.Allocation and node.extra_fields.alloc_size > 0:
            found.append((node.start_time_ns, Allocation(node.extra_fields.alloc_size, operators)))
        below = (*operators, node.name) if node.tag == kinds.TorchOp else operators
        for child in node.children:
            walk(child, below)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, ())
    return [allocation for _, allocation in sorted(found, key=lambda item: item[0])]


@pytest.fixture(scope="module", params=ROWS, ids="-".join)
def step(request: pytest.FixtureRequest) -> Iterator[NamedStep]:
    name, recipe, way = request.param
    combination = Combination(next(family for family in FAMILIES if family.name == name), recipe, way)
    seen: list[tuple[Timeline, StepMarks]] = []
    moments = Timeline.moments

    def spy(timeline: Timeline, marks: StepMarks) -> object:
        seen.append((timeline, marks))
        return moments(timeline, marks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timeline, "moments", spy)
        run = run_from_birth(combination)
    timeline, marks = seen[-1]
    lives = [life for life in timeline.lifetimes if run.begin_ns <= life.begin_ns <= run.end_ns]
    allocations = profiled_allocations(combination)
    assert [life.nbytes for life in lives] == [allocation.nbytes for allocation in allocations]
    unclaimed = {
        moment: breakdown[Category.TEMPORARIES]
        + breakdown[Category.UNATTRIBUTED]
        + breakdown.entries.get(EntryKey(Category.ACTIVATIONS, "", ""), 0)  # known by their life alone
        - run.loop.kept_by_modules()
        for moment, breakdown in run.record.moments.items()
    }
    return NamedStep(timeline, marks, list(zip(lives, allocations, strict=True)), unclaimed)


def origins(blocks: list[tuple[Lifetime, Allocation]]) -> set[str]:
    return {allocation.origin for _, allocation in blocks}


def test_the_named_blocks_are_all_that_is_unclaimed(step: NamedStep) -> None:
    """Byte for byte: nothing else is in temporaries and unattributed."""
    for moment in (Moment.FORWARD_END, Moment.PEAK, Moment.STEP_END):
        assert sum(life.nbytes for life, _ in step.nobodys(moment)) == step.unclaimed[moment], moment


def test_after_the_forward_pass_it_is_logits_and_loss(step: NamedStep, request: pytest.FixtureRequest) -> None:
    """What the model returned and the loop still holds; with checkpointing, also what a checkpoint keeps for itself."""
    _, _, way = request.node.callspec.params["step"]
    # Where torch tells of nodes, what a checkpoint is given is known by its life alone: it saves that beside its hooks.
    given = {"aten::embedding"} if tells_of_nodes() and way is Way.NON_REENTRANT else set()
    assert origins(step.nobodys(Moment.FORWARD_END)) - given == LEFT_BY_THE_FORWARD_PASS[way]


def test_under_a_checkpoint_autocast_casts_are_not_seen(step: NamedStep, request: pytest.FixtureRequest) -> None:
    """A checkpoint hides what is saved inside it, so the casts that autocast keeps stay temporaries there."""
    _, recipe, way = request.node.callspec.params["step"]
    casts = [
        allocation for _, allocation in step.nobodys(Moment.FORWARD_END) if "aten::_to_copy" in allocation.operators
    ]
    assert bool(casts) == (recipe is Recipe.AUTOCAST and way is Way.NON_REENTRANT)


def test_at_the_peak_it_is_what_backward_or_the_optimizer_computes_with(step: NamedStep) -> None:
    """Gradients of activations, recomputed activations, AdamW's intermediate results, and what forward has left."""
    at_peak = step.nobodys(Moment.PEAK)
    later = {BACKWARD, OPTIMIZER, SEED}
    left = origins(step.nobodys(Moment.FORWARD_END))
    assert origins(at_peak) <= later | left
    assert sum(life.nbytes for life, allocation in at_peak if allocation.origin in (BACKWARD, OPTIMIZER)) > 0


def test_each_phase_has_the_operators_of_that_phase(step: NamedStep) -> None:
    """The component of a temporary is the phase it was asked for in: backward and optimizer by their own nodes."""
    begins = [time_ns for time_ns, _ in step.marks.phases]
    for life, allocation in step.blocks:
        if life.tag is not None:
            continue
        reached = [phase for begin, (_, phase) in zip(begins, step.marks.phases, strict=True) if begin <= life.begin_ns]
        if allocation.origin == OPTIMIZER:
            assert reached[-1] is Phase.OPTIMIZER
        elif reached and reached[-1] is Phase.BACKWARD:
            assert allocation.origin == BACKWARD
        elif allocation.origin == BACKWARD:
            assert reached[-1] is Phase.FORWARD, "nodes before the first one that asks for a saved tensor"


def test_what_outlives_the_step_is_the_loss(step: NamedStep) -> None:
    """All that is unattributed comes from the operator of the loss."""
    assert origins(step.nobodys(Moment.STEP_END)) == {LOSS}

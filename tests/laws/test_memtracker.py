"""memtrace and torch's own MemTracker on the same models: they agree where MemTracker is right.

MemTracker looks at every operator of one iteration; memtrace at the allocator's events of a later one.
"""

from __future__ import annotations

import pytest
import torch
from laws.birth import run_from_birth
from laws.families import FAMILIES, Combination, Recipe, Way
from laws.loop import Loop
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

from memtrace.record.breakdown import Breakdown
from memtrace.record.categories import Category, Moment

pytestmark = [
    pytest.mark.filterwarnings("ignore:Module is None:UserWarning"),  # MemTracker's modules of freed outputs
    pytest.mark.filterwarnings("ignore:global module forward hook:UserWarning"),  # where MemTracker itself raises
]

SAME = {
    _MemRefType.PARAM: Category.WEIGHTS,
    _MemRefType.BUFFER: Category.BUFFERS,
    _MemRefType.GRAD: Category.GRADIENTS,
    _MemRefType.OPT: Category.OPTIMIZER_STATE,
}
"""What the two call differently."""

WITH_FROZEN_PARAMETERS = ("whisper", "frozen-base")
COMPARED = [
    *(
        Combination(family, recipe, Way.PLAIN)
        for family in FAMILIES
        for recipe in (Recipe.FP32, Recipe.BF16, Recipe.AUTOCAST)
        if family.name not in WITH_FROZEN_PARAMETERS
    ),
    *(Combination(FAMILIES[0], Recipe.FP32, way) for way in (Way.REENTRANT, Way.NON_REENTRANT)),
]


def row(name: str, recipe: Recipe, way: Way = Way.PLAIN) -> Combination:
    return Combination(next(family for family in FAMILIES if family.name == name), recipe, way)


def memtracker(combination: Combination) -> tuple[Loop, dict[_MemRefType, int]]:
    """Runs one step under MemTracker and returns its bytes of each kind afterwards."""
    torch.manual_seed(0)
    loop = Loop(combination)
    tracker = MemTracker()
    tracker.track_external(loop.model, loop.optimizer, *loop.masters)
    with tracker:
        loop.step()
        snapshot = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
    return loop, snapshot


def step_end(combination: Combination) -> Breakdown:
    return run_from_birth(combination).record.moments[Moment.STEP_END]


@pytest.mark.parametrize("combination", COMPARED, ids=str)
def test_weights_buffers_gradients_and_state_agree(combination: Combination) -> None:
    """To the byte, on every family whose parameters are all trained."""
    _, theirs = memtracker(combination)
    ours = step_end(combination)
    assert {kind: theirs[kind] for kind in SAME} == {kind: ours[category] for kind, category in SAME.items()}


@pytest.mark.parametrize("name", ["llama-tied", "convnet"])
def test_memtracker_knows_no_master_weights(name: str) -> None:
    """They are `Other` there and their gradients `Activation`; what is left agrees."""
    combination = row(name, Recipe.BF16_MASTER)
    loop, theirs = memtracker(combination)
    ours = step_end(combination)
    masters = sum(master.nbytes for master in loop.masters)
    assert theirs[_MemRefType.OTH] == ours[Category.MASTER_WEIGHTS] == masters
    assert theirs[_MemRefType.ACT] == masters, "the gradients of the master copies"
    assert theirs[_MemRefType.GRAD] + masters == ours[Category.GRADIENTS]
    for kind in (_MemRefType.PARAM, _MemRefType.BUFFER, _MemRefType.OPT):
        assert theirs[kind] == ours[SAME[kind]]


@pytest.mark.parametrize("name", WITH_FROZEN_PARAMETERS)
def test_memtracker_cannot_run_with_frozen_parameters(name: str) -> None:
    """It puts a gradient hook on every parameter. memtrace has its closed forms for these families."""
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        memtracker(row(name, Recipe.FP32))


def test_memtracker_cannot_accumulate() -> None:
    """It raises on the second forward pass of the model: accumulation, and any second step."""
    with pytest.raises(NotImplementedError, match="multiple iterative calls"):
        memtracker(row("llama-gqa", Recipe.FP32, Way.ACCUMULATION))


def test_memtracker_calls_casts_of_weights_activations() -> None:
    """After the forward pass under autocast, the low-precision copies of weights are activations there."""
    combination = row("llama-gqa", Recipe.AUTOCAST)
    torch.manual_seed(0)
    loop = Loop(combination)
    tracker = MemTracker()
    tracker.track_external(loop.model, loop.optimizer)
    batch = combination.batch()
    with tracker, torch.autocast("cpu", torch.bfloat16):
        loss = combination.family.loss(loop.model, batch)
        theirs = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
    assert loss.requires_grad
    ours = run_from_birth(combination).record.moments[Moment.FORWARD_END]
    linear = sum(m.weight.numel() for m in loop.model.modules() if isinstance(m, torch.nn.Linear))
    assert ours[Category.TRANSIENT_WEIGHTS] == 2 * linear, "each matrix once, two bytes an element"
    assert set(theirs) == {*_MemRefType, "Total"}, "no kind of its own for them"
    assert theirs[_MemRefType.ACT] >= ours[Category.ACTIVATIONS] + ours[Category.TRANSIENT_WEIGHTS]


def test_memtracker_sees_no_nested_state() -> None:
    """LBFGS keeps its directions in lists inside its state: MemTracker takes tensors at the first level only."""
    parameter = torch.nn.Parameter(torch.randn(64))
    optimizer = torch.optim.LBFGS([parameter], max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tracker = MemTracker()
    tracker.track_external(optimizer)
    theirs = tracker.get_tracker_snapshot("current")[torch.device("cpu")][_MemRefType.OPT]
    (state,) = optimizer.state.values()
    nested = {t.untyped_storage().data_ptr(): t.nbytes for name in ("old_dirs", "old_stps") for t in state[name]}
    first_level = {t.untyped_storage().data_ptr(): t.nbytes for t in state.values() if isinstance(t, torch.Tensor)}
    assert nested
    assert theirs == sum(first_level.values())
    assert not nested.keys() <= first_level.keys()

"""Plans held against the live tracer, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from laws.birth import run_from_birth
from laws.families import Combination, Family, Recipe, Way
from planning.larger_families import FAMILIES

from memtrace.planning.simulate import plan
from memtrace.record.breakdown import Breakdown, EntryKey
from memtrace.record.categories import PERSISTENT, Category, Moment
from memtrace.record.plan import Plan

RECIPES = {
    Recipe.FP32: "fp32",
    Recipe.BF16: "pure-bf16",
    Recipe.AUTOCAST: "hf-autocast",
    Recipe.BF16_MASTER: "bf16-master",
}
"""The recipe that plans what a row of the table trains."""


def saved(breakdown: Breakdown) -> int:
    """Returns the bytes of activations that a hook of autograd, or a node, has told of."""
    return sum(size for key, size in breakdown.entries.items() if key.category is Category.ACTIVATIONS and key.dtype)


@dataclass(frozen=True, slots=True)
class Row:
    """One combination, planned and measured on a CPU; bytes."""

    combination: Combination
    planned: Plan
    measured: dict[Moment, Breakdown]

    @property
    def peak_error(self) -> float:
        """Planned over measured peak, minus 1."""
        return self._error(lambda moments: moments[Moment.PEAK].total_bytes)

    @property
    def activations_error(self) -> float:
        """The same for what autograd has saved at the end of the forward pass; 0 where both have none.

        What is an activation by its life alone has no element type: it is in the peak, and not here.
        """
        return self._error(lambda moments: saved(moments[Moment.FORWARD_END]))

    @property
    def persistent(self) -> tuple[dict[EntryKey, int], dict[EntryKey, int]]:
        """Planned and measured entries that outlive the step, where it ends."""
        planned, measured = (
            {key: size for key, size in moments[Moment.STEP_END].entries.items() if key.category in PERSISTENT}
            for moments in (self.planned.moments, self.measured)
        )
        return planned, measured

    def _error(self, size: Callable[..., int]) -> float:
        planned, measured = size(self.planned.moments), size(self.measured)
        return 0.0 if planned == measured else planned / measured - 1


def rows(families: Sequence[Family] = FAMILIES) -> Iterator[Combination]:
    """Yields every combination of these families."""
    for family in families:
        for recipe in Recipe:
            for way in Way:
                if recipe not in family.left_out and way not in family.left_out:
                    yield Combination(family, recipe, way)


def measure(combination: Combination) -> Row:
    """Plans and trains one combination.

    Both without oneDNN: what that takes inside its kernels depends on the processor.
    """
    torch.manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=False):
        planned = plan(
            combination.build,
            combination.batch,
            recipe=RECIPES[combination.recipe],
            loss=combination.family.loss,
            accumulation_steps=combination.way.micro_batches,
            device="cpu",
        )
        return Row(combination, planned, dict(run_from_birth(combination).record.moments))

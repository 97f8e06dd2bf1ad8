"""Plans held against the live tracer, row by row, and the table that documents them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from laws.birth import run_from_birth
from laws.families import Combination, Family, Recipe, Way
from planning.larger_families import FAMILIES

from memtrace.breakdown import Breakdown, EntryKey
from memtrace.categories import PERSISTENT, Category, Moment
from memtrace.planning.plan import Plan
from memtrace.planning.simulate import plan

RECIPES = {
    Recipe.FP32: "fp32",
    Recipe.BF16: "pure-bf16",
    Recipe.AUTOCAST: "hf-autocast",
    Recipe.BF16_MASTER: "bf16-master",
}
"""The recipe that plans what a row of the table trains."""


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
        """The same for activations at the end of the forward pass; 0 where both have none."""
        return self._error(lambda moments: moments[Moment.FORWARD_END][Category.ACTIVATIONS])

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
    """Plans and trains one combination."""
    torch.manual_seed(0)
    planned = plan(
        combination.build,
        combination.batch,
        recipe=RECIPES[combination.recipe],
        loss=combination.family.loss,
        accumulation_steps=combination.way.micro_batches,
        device="cpu",
    )
    return Row(combination, planned, dict(run_from_birth(combination).record.moments))


def document(table: Sequence[Row], beyond: Sequence[Row]) -> str:
    """Returns docs/accuracy.md.

    Args:
        table: rows that the bounds hold for.
        beyond: rows of models whose CPU kernels take more than torch tells.
    """
    peaks = [abs(row.peak_error) for row in table]
    activations = [abs(row.activations_error) for row in table]
    families = {row.combination.family.name for row in table}
    worst = max(table, key=lambda row: abs(row.peak_error))
    lines = [
        "# How accurate a simulated plan is",
        "",
        "Written by `python -m pytest -m long tests/planning/test_accuracy.py`; do not edit.",
        "",
        f"{len(table)} training set-ups of {len(families)} model families are planned without memory, then trained on",
        "a CPU under the live tracer, from before the model was built. The second step of both is compared: the peak",
        "of what is allocated, and the activations where the forward pass ends. Weights, gradients, optimizer states,",
        "master copies and buffers are equal byte for byte in every row.",
        "",
        "| | median | worst |",
        "|---|---:|---:|",
        f"| peak | {statistics.median(peaks):.3%} | {max(peaks):.2%} ({worst.combination}) |",
        f"| activations | {statistics.median(activations):.3%} | {max(activations):.2%} |",
        "",
        "What is left is scratch memory inside CPU kernels: oneDNN packs the operands of bfloat16 products and keeps",
        "them for the length of one kernel. It does not grow with the model, so the smallest models have the largest",
        "errors. Checkpointing also keeps 5 kB of random state for each block.",
        "",
        *_table(table),
        "",
        "## Beyond these bounds on a CPU",
        "",
        "oneDNN copies the images of a convolution to a layout of its own, and runs an LSTM in one kernel with a",
        "workspace; torch tells neither to a simulation.",
        "",
        *_table(beyond),
        "",
        "## Not measured",
        "",
        "For want of a GPU: the kernels of CUDA (what differs from a CPU is in `memtrace/sources/kernels.py` and",
        "`cuda_functions.py`, each with its source) and the bytes that CUDA's allocator reserves.",
        "",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | recipe | step | measured peak, MB | planned peak | planned activations |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        peak = row.measured[Moment.PEAK].total_bytes / 1e6
        lines.append(
            f"| {row.combination.family.name} | {RECIPES[row.combination.recipe]} | {row.combination.way} | {peak:.1f} "
            f"| {row.peak_error:+.2%} | {row.activations_error:+.2%} |"
        )
    return lines

"""What every byte is for, over all families, recipes and ways to run a step: recorded from birth, equal to formulas.

The formulas are made from shapes alone: elements times the size of one, each storage once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from laws.birth import BornRun, run_from_birth
from laws.families import FAMILIES, Combination, Recipe, Way, combinations

from memtrace.record.breakdown import Breakdown, EntryKey
from memtrace.record.categories import Category, Moment

Entries = dict[EntryKey, int]

LIVES_BEYOND_THE_STEP = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE, Category.BUFFERS)


@pytest.fixture(scope="module", params=combinations(), ids=str)
def run(request: pytest.FixtureRequest) -> Iterator[BornRun]:
    """One row of the table, trained and recorded once for all tests."""
    return run_from_birth(request.param)


def entries_of(
    tensors: Iterable[torch.Tensor], category: Category, component: str = "", dtype: torch.dtype | None = None
) -> Entries:
    """Elements times element size of tensors (or of tensors like them with another type), each storage once."""
    entries: Entries = {}
    for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values():
        kind = dtype or tensor.dtype
        key = EntryKey(category, component, str(kind).removeprefix("torch."))
        entries[key] = entries.get(key, 0) + tensor.numel() * kind.itemsize
    return entries


def persistent(run: BornRun) -> Entries:
    """Weights, buffers, master weights and AdamW's state."""
    loop = run.loop
    updated = loop.masters or loop.trainable
    frozen = [parameter for parameter in loop.model.parameters() if not parameter.requires_grad]
    steps = {EntryKey(Category.OPTIMIZER_STATE, "step", "float32"): 4 * len(updated)}
    return {
        **entries_of(loop.trainable, Category.WEIGHTS, "trainable"),
        **entries_of(frozen, Category.WEIGHTS, "frozen"),
        **entries_of(loop.model.buffers(), Category.BUFFERS),
        **entries_of(loop.trainable if loop.masters else (), Category.MASTER_WEIGHTS, dtype=torch.float32),
        **entries_of(updated, Category.OPTIMIZER_STATE, "exp_avg"),
        **entries_of(updated, Category.OPTIMIZER_STATE, "exp_avg_sq"),
        **steps,
    }


def only(breakdown: Breakdown, *categories: Category) -> Entries:
    return {key: size for key, size in breakdown.entries.items() if key.category in categories}


def test_the_second_step_is_traced_and_has_every_moment(run: BornRun) -> None:
    """It is the first step that begins with optimizer state."""
    assert run.record.traced
    assert run.record.step == 2
    assert set(run.record.moments) == set(Moment)


def test_the_categories_add_up_to_what_was_allocated(run: BornRun) -> None:
    """Law 1, byte for byte, at every moment; from birth, so that no block can hide."""
    for moment, breakdown in run.record.moments.items():
        assert breakdown.total_bytes == breakdown.allocated_bytes, moment


def test_the_peak_is_the_profilers_own(run: BornRun) -> None:
    """The highest total that torch's profiler counted during the step, to the byte."""
    assert run.record.moments[Moment.PEAK].allocated_bytes == run.profiler_peak_bytes()


def test_what_outlives_the_step_equals_its_closed_form(run: BornRun) -> None:
    """Weights, buffers, master weights and optimizer state, by component and element type, at every moment."""
    expected = persistent(run)
    for moment, breakdown in run.record.moments.items():
        assert only(breakdown, *LIVES_BEYOND_THE_STEP) == expected, moment


def test_gradients_equal_their_closed_form(run: BornRun) -> None:
    """As the parameters when backward has ended; while it runs the first time, not yet all of them."""
    loop = run.loop
    model = entries_of(loop.trainable, Category.GRADIENTS)
    expected = {**model, **entries_of(loop.masters, Category.GRADIENTS)}
    moments = run.record.moments
    assert only(moments[Moment.BACKWARD_END], Category.GRADIENTS) == expected
    assert only(moments[Moment.STEP_END], Category.GRADIENTS) == expected
    accumulates = loop.combination.way is Way.ACCUMULATION
    assert only(moments[Moment.FORWARD_END], Category.GRADIENTS) == (model if accumulates else {})


def test_nothing_but_the_losses_is_left_unattributed(run: BornRun) -> None:
    """The loop keeps its losses, and nobody has claimed them: nothing else outlives the step unclaimed.

    But for tensors that a model's code keeps as plain attributes.
    """
    kept = sum(loss.nbytes for loss in run.losses) + run.loop.kept_by_modules()
    assert run.record.moments[Moment.STEP_END][Category.UNATTRIBUTED] == kept
    for breakdown in run.record.moments.values():
        assert breakdown[Category.UNATTRIBUTED] <= kept


def test_after_the_step_there_are_no_temporaries(run: BornRun) -> None:
    """When backward has ended and when the optimizer has: activations and temporaries are all freed."""
    for moment in (Moment.BACKWARD_END, Moment.STEP_END):
        spent = (Category.ACTIVATIONS, Category.TEMPORARIES, Category.TRANSIENT_WEIGHTS)
        assert only(run.record.moments[moment], *spent) == {}


def test_the_table_is_as_large_as_it_should_be() -> None:
    """At least ten families, every recipe for each of them, and a reason for what is left out."""
    assert len(FAMILIES) >= 10
    rows = combinations()
    assert len({str(row) for row in rows}) == len(rows)
    for family in FAMILIES:
        assert {row.recipe for row in rows if row.family is family} == set(Recipe)
        assert all(family.left_out.values())
        assert {Way.PLAIN, Way.ACCUMULATION} <= {row.way for row in rows if row.family is family}


def parameters_of(name: str) -> int:
    family = next(family for family in FAMILIES if family.name == name)
    model = Combination(family, Recipe.FP32, Way.PLAIN).build()
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_parameter_count_of_llama_is_the_papers() -> None:
    """Embeddings, two norms a layer and one at the end, grouped-query attention and a gated feed-forward: so the
    shapes that the other formulas start from are right, and tying saves one embedding."""
    vocabulary, hidden, inner, layers, key_values = 96, 32, 48, 2, 16
    attention = 2 * hidden * hidden + 2 * hidden * key_values
    layer = attention + 3 * hidden * inner + 2 * hidden
    tied = vocabulary * hidden + layers * layer + hidden
    assert parameters_of("llama-tied") == tied
    assert parameters_of("llama-gqa") == tied + vocabulary * hidden

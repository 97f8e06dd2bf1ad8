"""Remedies follow from the composition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cuda_scenes import GIB

from memtrace.oom.advice import ModelFacts, Situation, remedies
from memtrace.record.breakdown import BatchShape, EntryKey
from memtrace.record.categories import Category, Phase
from memtrace.record.oom.report import FailedRequest, Fragmentation, Remedy, RemedyKind, Witness


def advise(entries: dict[EntryKey, int], phase: Phase = Phase.FORWARD, **known) -> dict[RemedyKind, Remedy]:
    request = FailedRequest(
        witness=Witness.ALLOCATOR,
        phase=phase,
        requested_bytes=known.pop("requested", GIB),
        free_bytes=known.pop("free", GIB // 2),
    )
    situation = Situation(entries=entries, request=request, facts=known.pop("facts", ModelFacts()), **known)
    return {remedy.kind: remedy for remedy in remedies(situation)}


ACTIVATIONS = {EntryKey(Category.ACTIVATIONS, "", "float32"): 16 * GIB}
ADAM = {
    EntryKey(Category.WEIGHTS, "trainable", "float32"): 4 * GIB,
    EntryKey(Category.GRADIENTS, "", "float32"): 4 * GIB,
    EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): 4 * GIB,
    EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"): 4 * GIB,
}


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    """Of n layers, 1/n is recomputed at a time and 2/34 of each is kept."""
    saved = advise(ACTIVATIONS, facts=ModelFacts(repeated_blocks=10))[RemedyKind.CHECKPOINTING].saved_bytes
    assert saved == pytest.approx(16 * GIB * (1 - 1 / 10 - 2 / 34), rel=1e-9)


def test_what_was_asked_for_stands_before_the_segment() -> None:
    """What was missing follows from the request where it is known, and else from the segment, its upper bound."""
    known = FailedRequest(
        witness=Witness.ALLOCATOR, phase=Phase.FORWARD, requested_bytes=3, segment_bytes=20, free_bytes=1
    )
    assert Situation(entries={}, request=known, facts=ModelFacts()).shortfall_bytes == 2
    bound = replace(known, requested_bytes=None)
    assert Situation(entries={}, request=bound, facts=ModelFacts()).shortfall_bytes == 19


def test_checkpointing_needs_layers() -> None:
    """A model without a list of layers has nothing to checkpoint one by one."""
    assert RemedyKind.CHECKPOINTING not in advise(ACTIVATIONS)


def test_half_the_micro_batch_takes_half_of_the_failed_request_too() -> None:
    """In the passes the request follows the batch; an odd batch is not halved exactly."""
    batch = BatchShape(shape=(5, 128), tokens=640, largest_micro_batch_tokens=640)
    saved = advise(ACTIVATIONS, batch=batch)[RemedyKind.SMALLER_MICRO_BATCH].saved_bytes
    assert saved == int(17 * GIB * 3 / 5)


def test_batch_of_one_is_not_halved() -> None:
    """A micro batch of one sample cannot be smaller."""
    batch = BatchShape(shape=(1, 128), tokens=128, largest_micro_batch_tokens=128)
    assert RemedyKind.SMALLER_MICRO_BATCH not in advise(ACTIVATIONS, batch=batch)


def test_bf16_pays_for_the_casts_of_the_weights() -> None:
    """Autocast halves activations and keeps casts of half the size of the weights."""
    saved = advise(ACTIVATIONS | ADAM)[RemedyKind.BF16].saved_bytes
    assert saved == (16 + 1 - 4) * GIB / 2


def test_bf16_is_not_proposed_where_it_is_on() -> None:
    """Neither to a bf16 model nor under autocast."""
    in_bf16 = {EntryKey(Category.WEIGHTS, "trainable", "bfloat16"): 4 * GIB}
    casts = {EntryKey(Category.TRANSIENT_WEIGHTS, "autocast", "bfloat16"): 2 * GIB}
    assert RemedyKind.BF16 not in advise(ACTIVATIONS | in_bf16)
    assert RemedyKind.BF16 not in advise(ACTIVATIONS | ADAM | casts)


def test_eight_bit_state_keeps_scales() -> None:
    """Four bytes become one and the share of a scale; what is in 8 bits already stays."""
    saved = advise(ADAM)[RemedyKind.EIGHT_BIT_OPTIMIZER].saved_bytes
    assert saved == 8 * GIB * (4 - 1 - 4 / 256) / 4
    assert RemedyKind.EIGHT_BIT_OPTIMIZER not in advise({EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "uint8"): GIB})


def test_sharding_over_the_ranks_of_the_run() -> None:
    """Each of n ranks keeps the n-th part of weights, gradients and state."""
    remedy = advise(ADAM, world_size=8)[RemedyKind.SHARDING]
    assert remedy.saved_bytes == 16 * GIB * 7 / 8
    assert "10.50 GiB" in remedy.advice, "what ZeRO-2 saves of it"


def test_expandable_segments_only_where_the_slack_explains_it() -> None:
    """Free pieces help where together they hold the request, and where segments cannot grow yet."""
    pieces = Fragmentation(free_bytes=3 * GIB, largest_free_bytes=GIB // 4, segments=9, expandable=False)
    assert advise(ADAM, fragmentation=pieces)[RemedyKind.EXPANDABLE_SEGMENTS].would_fit
    assert RemedyKind.EXPANDABLE_SEGMENTS not in advise(ADAM, fragmentation=pieces, requested=4 * GIB)
    grown = Fragmentation(free_bytes=3 * GIB, largest_free_bytes=GIB // 4, segments=9, expandable=True)
    assert RemedyKind.EXPANDABLE_SEGMENTS not in advise(ADAM, fragmentation=grown)


def test_foreach_is_blamed_in_the_optimizer_only() -> None:
    """Temporaries of another phase are not those of the optimizer."""
    temporaries = {EntryKey(Category.TEMPORARIES, Phase.OPTIMIZER, ""): 2 * GIB}
    facts = ModelFacts(foreach=True)
    found = advise(ADAM | temporaries, phase=Phase.OPTIMIZER, facts=facts)
    assert found[RemedyKind.NO_FOREACH].saved_bytes == 3 * GIB
    assert RemedyKind.NO_FOREACH not in advise(ADAM | temporaries, facts=facts)


def test_fit_is_told_by_what_was_missing() -> None:
    """A remedy fits where it saves what was missing: the request less what was free."""
    batch = BatchShape(shape=(8, 128), tokens=1024, largest_micro_batch_tokens=1024)
    found = advise(ADAM | {EntryKey(Category.ACTIVATIONS, "", "bfloat16"): GIB}, requested=12 * GIB, batch=batch)
    assert found[RemedyKind.SHARDING].would_fit is False
    assert advise(ADAM, requested=8 * GIB)[RemedyKind.SHARDING].would_fit is True
    assert advise(ADAM, requested=None)[RemedyKind.SHARDING].would_fit is None


def test_small_unclaimed_rest_is_not_a_leak() -> None:
    """A few percent that nobody claims are ordinary."""
    little = {EntryKey(Category.UNATTRIBUTED, "", ""): GIB // 10}
    assert RemedyKind.UNATTRIBUTED not in advise(ADAM | little)
    much = {EntryKey(Category.UNATTRIBUTED, "", ""): 2 * GIB}
    assert advise(ADAM | much)[RemedyKind.UNATTRIBUTED].saved_bytes == 2 * GIB


def test_nothing_known_gives_no_advice() -> None:
    """An empty composition has no remedies."""
    assert advise({}, requested=None, free=None) == {}

"""What would have helped: ways to need less memory, and how much each saves by what was allocated. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from memtrace.record.breakdown import BatchShape, EntryKey
from memtrace.record.categories import Category, Phase
from memtrace.record.oom.report import FailedRequest, Fragmentation, Remedy, RemedyKind
from memtrace.record.units import format_bytes
from memtrace.sources.cuda.settings_variable import variable_for

_CHECKPOINT_SHARE = 2 / 34
"""What a checkpointed transformer layer keeps of what it saves otherwise: its input, 2 of the 34 bytes for each element
of it (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4)."""
_QUANTISED_STATE_BYTES = 1 + 4 / 256
"""Bytes for one element of 8-bit optimizer state: one, and a float32 scale for each block of 256 (Dettmers et al.
2022, "8-bit Optimizers via Block-wise Quantization"; the block size is bitsandbytes')."""
_ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_SHARDED_BY_STAGE_2 = (Category.OPTIMIZER_STATE, Category.MASTER_WEIGHTS, Category.GRADIENTS)
_NOTABLE_LEAK = 0.05
"""Share of all memory above which what nobody claims is worth a search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a remedy needs to know of the training, beside the memory."""

    checkpointing: bool = False
    """Whether activation checkpointing is on already."""
    repeated_blocks: int = 0
    """Layers of the model's longest list of modules: what checkpointing works on."""
    sharded: bool = False
    """Whether an engine shards the states already."""
    foreach: bool = False
    """Whether an optimizer works on lists of tensors, with temporaries as large as the parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the remedies are computed from."""

    entries: Mapping[EntryKey, int]
    request: FailedRequest
    facts: ModelFacts
    batch: BatchShape | None = None
    world_size: int = 1
    fragmentation: Fragmentation | None = None
    other_processes_bytes: int | None = None
    device_free_bytes: int | None = None
    """What the device had free when it was last read, for a request that came without it."""

    def held(self, categories: Collection[Category], dtypes: Collection[str] | None = None) -> int:
        """Returns the bytes of some categories, of some element types only where given."""
        return sum(
            size
            for key, size in self.entries.items()
            if key.category in categories and (dtypes is None or key.dtype in dtypes)
        )

    @property
    def requested_by_batch(self) -> int:
        """Bytes of the failed request, or their upper bound, where its size follows from the batch; 0 otherwise."""
        in_passes = self.request.phase in (Phase.FORWARD, Phase.BACKWARD)
        return (self.request.bound_bytes or 0) if in_passes else 0

    @property
    def shortfall_bytes(self) -> int | None:
        """What was missing for the request; None where its size or what was free is not known."""
        requested = self.request.bound_bytes
        free = self.device_free_bytes if self.request.free_bytes is None else self.request.free_bytes
        return None if requested is None or free is None else max(requested - free, 0)


def remedies(situation: Situation) -> tuple[Remedy, ...]:
    """Returns what would have left more memory free, what saves most first.

    Each is computed alone, from what was allocated at that moment; two together save less than their sum.
    """
    shortfall = situation.shortfall_bytes
    found = [
        Remedy(
            kind=kind,
            saved_bytes=int(saved),
            would_fit=None if shortfall is None else saved >= shortfall,
            advice=advice,
        )
        for rule in _RULES
        for kind, saved, advice in rule(situation)
        if saved >= 1
    ]
    return tuple(sorted(found, key=lambda remedy: -remedy.saved_bytes))


_Proposal = tuple[RemedyKind, float, str]
_Rule = Callable[[Situation], Iterator[_Proposal]]


def _checkpointing(situation: Situation) -> Iterator[_Proposal]:
    layers = situation.facts.repeated_blocks
    if situation.facts.checkpointing or layers < 2:
        return
    activations = situation.held((Category.ACTIVATIONS,))
    yield (
        RemedyKind.CHECKPOINTING,
        activations * max(1 - _CHECKPOINT_SHARE - 1 / layers, 0),
        "Recompute activations in the backward pass (activation_checkpointing=True under Trainer, in older versions of "
        f"transformers gradient_checkpointing=True): of {layers} layers, only the inputs and one "
        "layer's activations are kept. Costs about a third more computation.",
    )


def _smaller_micro_batch(situation: Situation) -> Iterator[_Proposal]:
    batch = situation.batch
    if batch is None or not batch.shape or batch.shape[0] < 2:
        return
    of_passes = {
        key: size
        for key, size in situation.entries.items()
        if key.category in (Category.ACTIVATIONS, Category.INPUTS)
        or (key.category is Category.TEMPORARIES and key.component != Phase.OPTIMIZER)
    }
    rows = batch.shape[0]
    saved = (sum(of_passes.values()) + situation.requested_by_batch) * (rows - rows // 2) / rows
    yield (
        RemedyKind.SMALLER_MICRO_BATCH,
        saved,
        f"Halve the micro batch (per_device_train_batch_size {rows} to {rows // 2}) and double "
        "gradient_accumulation_steps: the same training, the same effective batch.",
    )


def _bf16(situation: Situation) -> Iterator[_Proposal]:
    weights = situation.held((Category.WEIGHTS,))
    in_fp32 = situation.held((Category.WEIGHTS,), ("float32",))
    if situation.held((Category.TRANSIENT_WEIGHTS,)) or in_fp32 * 2 < weights or not in_fp32:
        return
    activations = situation.held((Category.ACTIVATIONS,), ("float32", "")) + situation.requested_by_batch
    yield (
        RemedyKind.BF16,
        activations / 2 - in_fp32 / 2,
        "Compute in bf16 (bf16=True): activations take half, less the casts of the weights that autocast keeps.",
    )


def _eight_bit_optimizer(situation: Situation) -> Iterator[_Proposal]:
    saved = sum(
        size * max(1 - _QUANTISED_STATE_BYTES / _ELEMENT_BYTES[key.dtype], 0)
        for key, size in situation.entries.items()
        if key.category is Category.OPTIMIZER_STATE and key.dtype in _ELEMENT_BYTES
    )
    yield (
        RemedyKind.EIGHT_BIT_OPTIMIZER,
        saved,
        'Keep the optimizer state in 8 bits (optim="adamw_bnb_8bit", or torchao\'s AdamW8bit).',
    )


def _sharding(situation: Situation) -> Iterator[_Proposal]:
    if situation.facts.sharded:
        return
    ranks = max(situation.world_size, 2)
    share = 1 - 1 / ranks
    stage_2 = situation.held(_SHARDED_BY_STAGE_2) * share
    stage_3 = stage_2 + situation.held((Category.WEIGHTS,)) * share
    among = f"the {ranks} ranks of this run" if situation.world_size > 1 else "two GPUs instead of one"
    yield (
        RemedyKind.SHARDING,
        stage_3,
        f"Shard the model over {among}: FSDP or ZeRO-3. ZeRO-2, which leaves the weights whole, saves "
        f"{format_bytes(stage_2)} of it.",
    )


def _no_foreach(situation: Situation) -> Iterator[_Proposal]:
    if not situation.facts.foreach or situation.request.phase is not Phase.OPTIMIZER:
        return
    temporaries = sum(
        size
        for key, size in situation.entries.items()
        if key.category is Category.TEMPORARIES and key.component == Phase.OPTIMIZER
    )
    yield (
        RemedyKind.NO_FOREACH,
        temporaries + (situation.request.bound_bytes or 0),
        "Give the optimizer foreach=False, or fused=True where it has that: it then holds no temporary copies of all "
        "parameters at once.",
    )


def _expandable_segments(situation: Situation) -> Iterator[_Proposal]:
    cut_up, requested = situation.fragmentation, situation.request.bound_bytes
    if cut_up is None or cut_up.expandable or requested is None or cut_up.free_bytes < requested:
        return
    variable = variable_for(str(torch.__version__))
    yield (
        RemedyKind.EXPANDABLE_SEGMENTS,
        cut_up.free_bytes,
        f"Set {variable}=expandable_segments:True. The allocator held more than was asked for, but in pieces: "
        f"the largest has {format_bytes(cut_up.largest_free_bytes)}.",
    )


def _other_processes(situation: Situation) -> Iterator[_Proposal]:
    yield (
        RemedyKind.OTHER_PROCESSES,
        situation.other_processes_bytes or 0,
        "Other processes hold memory of this device: end them, or train on another one.",
    )


def _eval_accumulation(situation: Situation) -> Iterator[_Proposal]:
    if not situation.request.evaluation:
        return
    yield (
        RemedyKind.EVAL_ACCUMULATION,
        situation.held((Category.UNATTRIBUTED,)) + (situation.request.bound_bytes or 0),
        "Trainer gathers the logits and labels of the whole set on the device: move them to the host every few batches "
        "(eval_accumulation_steps=16), keep less of them (preprocess_logits_for_metrics), or only the loss "
        "(prediction_loss_only=True). Where one batch alone is too large, lower per_device_eval_batch_size.",
    )


def _unattributed(situation: Situation) -> Iterator[_Proposal]:
    unclaimed = 0 if situation.request.evaluation else situation.held((Category.UNATTRIBUTED,))
    if not unclaimed or unclaimed < _NOTABLE_LEAK * sum(situation.entries.values()):
        return
    yield (
        RemedyKind.UNATTRIBUTED,
        unclaimed,
        "Find out who keeps tensors that are no part of model or optimizer: a list of losses with their graphs, a "
        "second model, a cache.",
    )


_RULES: tuple[_Rule, ...] = (
    _checkpointing,
    _smaller_micro_batch,
    _bf16,
    _eight_bit_optimizer,
    _sharding,
    _no_foreach,
    _expandable_segments,
    _other_processes,
    _eval_accumulation,
    _unattributed,
)

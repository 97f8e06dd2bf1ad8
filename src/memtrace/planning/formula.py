"""A plan from a parameter count: every figure follows from a recipe, an optimizer and a strategy in closed form.

The moments of a step are built from a few parts, each with its lifetime: what is always there, what the forward pass
adds, what the backward pass adds, what the optimizer's step adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil

from memtrace.planning import assumptions
from memtrace.planning.further import further_setup
from memtrace.planning.optimizers.layouts import is_scale
from memtrace.planning.recipe import DEEPSPEED_CONVERTS, DTYPE_BYTES, under_deepspeed
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import (
    ZERO3_MAX_LIVE,
    ZERO3_SUB_GROUP,
    ZERO_REDUCE_BUCKET,
    Offload,
    Strategy,
)
from memtrace.record.breakdown import Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import ByteRange, Plan

LARGEST_MATRIX = Fraction(1, 3)
"""Share of a transformer layer that its largest matrix has at most: 4 of 12 squares of the hidden size in GPT's layers,
less in those with a gate."""

Part = tuple[EntryKey, int]
"""One entry of a breakdown."""


def plan_by_formula(request: PlanRequest) -> Plan:
    """Returns the plan of one rank, in closed form: no model is built, nothing is simulated.

    The peak is an upper bound where a step has one micro batch: it counts activations and gradients both whole, as
    they are together in the second of several micro batches. The lower end of `Plan.allocated` is the largest moment
    that surely occurs.
    """
    converts = request.sharding.is_zero and request.recipe.casts
    if converts:
        request = replace(request, recipe=under_deepspeed(request.recipe))
    step = _Step(request)
    always, gradients = list(step.always()), list(step.gradients())
    forward, gathered = list(step.activations()), [*step.gathered(), *step.dequantized()]
    standing = always + (gradients if step.gradients_stay else [])
    waiting = always + gradients
    held_in_forward = waiting if request.accumulation_steps > 1 else standing
    moments = {
        Moment.FORWARD_END: held_in_forward + forward + gathered,
        **({Moment.BACKWARD_END: waiting} if request.optimizer.steps else {}),
        Moment.STEP_END: standing,
    }
    backward = waiting + forward + gathered + list(step.reduction())
    update = always + list(step.update())
    peak = max(backward, update, key=_total)
    low = max(map(_total, (held_in_forward + forward, waiting, update)))
    high = max(_total(backward), _total(update) + step.foreach_bytes())
    return Plan(
        recipe=request.recipe.name,
        optimizer=request.optimizer.name,
        setup=setup_of(request),
        moments={
            moment: Breakdown(moment=moment, entries=ordered_entries(_merge(parts)), estimated=True)
            for moment, parts in {**moments, Moment.PEAK: peak}.items()
        },
        assumptions=(*assumptions.of(request), *([DEEPSPEED_CONVERTS] if converts else [])),
        allocated=ByteRange(low=low, high=None if request.activations is None else high),
        host_bytes=step.host_bytes(),
    )


class _Step:
    """The parts of one rank's step, each as entries of a breakdown."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._recipe = request.recipe
        self._sharding = request.sharding
        self._strategy = request.sharding.strategy
        self._offload = request.sharding.offload
        share, whole = request.sharding.share, int
        self._weight_share = share if request.sharding.shards_weights else whole
        self._gradient_share = share if request.sharding.shards_gradients else whole
        self._state_share = share if request.sharding.shards_states else whole
        fsdp = self._strategy is Strategy.FSDP
        self._gradient_dtype = self._recipe.updated if fsdp else self._recipe.gradients

    @property
    def gradients_stay(self) -> bool:
        """Whether the memory of the gradients is held from step to step, zeroed instead of freed."""
        return (
            self._recipe.gradients_persist
            or self._strategy is Strategy.ZERO3
            or (self._strategy is Strategy.DDP and self._sharding.gradient_as_bucket_view)
        )

    def always(self) -> Iterator[Part]:
        """Yields weights, masters, optimizer states and lasting buffers."""
        if self._offload is not Offload.PARAMETERS:
            yield from self._weights()
        if self._offload is Offload.NONE:
            yield from self._states()
        if not self._request.trainable:
            return
        if self._strategy is Strategy.DDP and not self._sharding.gradient_as_bucket_view:
            if not self._recipe.gradients_persist:
                yield _part(Category.COMM_BUFFERS, "bucket", self._recipe.gradients, self._request.trainable)
        elif self._strategy is Strategy.ZERO3:
            yield _part(Category.COMM_BUFFERS, "reduce", self._recipe.weights, ZERO_REDUCE_BUCKET)

    def gradients(self) -> Iterator[Part]:
        """Yields what waits for the optimizer."""
        if self._offload is Offload.NONE and self._request.trainable:
            yield self._gradient_part()

    def activations(self) -> Iterator[Part]:
        """Yields what the forward pass leaves for the backward pass."""
        if self._request.activations:
            key = EntryKey(Category.ACTIVATIONS, "", self._recipe.compute)
            yield key, self._request.activations
        if self._recipe.casts and self._strategy is not Strategy.FSDP:
            trainable = self._request.trainable
            if self._strategy is Strategy.ZERO3:
                trainable = min(trainable, self._request.largest_layer)
            yield _part(Category.TRANSIENT_WEIGHTS, "autocast", self._recipe.compute, trainable)

    def gathered(self) -> Iterator[Part]:
        """Yields the whole copies of sharded weights while they are used."""
        if not self._sharding.shards_weights:
            return
        if self._strategy is Strategy.ZERO3:
            elements = min(self._request.parameters, ZERO3_MAX_LIVE)
            dtype = self._recipe.weights
        else:
            elements, dtype = self._request.largest_layer, self._recipe.compute
        if self._recipe.trains_adapters:
            for stored in self._recipe.frozen_base:
                if stored.sharded:
                    key = EntryKey(Category.TRANSIENT_WEIGHTS, "all_gather", stored.dtype)
                    yield key, ceil(elements * stored.bytes_each)
        else:
            yield _part(Category.TRANSIENT_WEIGHTS, "all_gather", dtype, elements)

    def dequantized(self) -> Iterator[Part]:
        """Yields the whole copy of one 4-bit weight while it is multiplied: one matrix of a layer at a time."""
        if self._recipe.quantizes:
            elements = ceil(self._request.largest_layer * LARGEST_MATRIX)
            yield _part(Category.TRANSIENT_WEIGHTS, "dequantized", self._recipe.compute, elements)

    def reduction(self) -> Iterator[Part]:
        """Yields the buffers that the backward pass reduces gradients in, and whole gradients on their way."""
        trainable = self._request.trainable
        if not trainable:
            return
        if self._strategy in (Strategy.ZERO1, Strategy.ZERO2) and not self._recipe.gradients_persist:
            buckets = 2 if self._sharding.overlap_comm else 1
            yield _part(Category.COMM_BUFFERS, "reduce", self._recipe.weights, buckets * ZERO_REDUCE_BUCKET)
        elif self._strategy is Strategy.FSDP:
            layer, compute = self._request.largest_layer, self._recipe.compute
            trained = min(layer, trainable)
            yield _part(Category.COMM_BUFFERS, "all_gather", compute, layer)
            yield _part(Category.COMM_BUFFERS, "reduce_scatter", compute, trained)
            yield _part(Category.GRADIENTS, "unsharded", compute, trained)

    def update(self) -> Iterator[Part]:
        """Yields the gradients that the optimizer's step works on, and what it allocates; not foreach temporaries.

        DeepSpeed's ZeRO optimizers copy the gradients of this rank's share to float32, and in stage 1 have dropped
        the others by then (stage_1_and_2.py, `step`; stage3.py, `_prepare_fp32_grad_for_sub_group`).
        """
        trainable = self._request.trainable
        if not trainable or self._offload is not Offload.NONE:
            return
        copied = self._sharding.copies_gradients and self._recipe.gradients != "float32"
        share = self._sharding.share(trainable)
        yield _part(Category.GRADIENTS, "", self._recipe.gradients, share) if copied else self._gradient_part()
        if copied:
            at_a_time = min(share, ZERO3_SUB_GROUP) if self._strategy is Strategy.ZERO3 else share
            yield _part(Category.GRADIENTS, "", "float32", at_a_time)
        elif self._strategy is Strategy.ZERO0:
            yield _part(Category.COMM_BUFFERS, "reduce", self._recipe.gradients, min(trainable, ZERO_REDUCE_BUCKET))

    def foreach_bytes(self) -> int:
        """Returns what torch's foreach step would allocate besides; 0 where DeepSpeed brings its own optimizer."""
        if self._sharding.brings_fused_step or self._offload is not Offload.NONE:
            return 0
        elements = self._state_share(self._request.trainable)
        if self._strategy is Strategy.ZERO3:
            elements = min(elements, ZERO3_SUB_GROUP)
        return self._request.optimizer.foreach_copies * elements * DTYPE_BYTES[self._recipe.updated]

    def host_bytes(self) -> int:
        """Returns the bytes that offloading keeps in the memory of the host; DeepSpeed keeps gradients in float32."""
        paged = list(self._optimizer_states(paged=True))
        if self._offload is Offload.NONE:
            return _total(paged)
        parts = [*self._states(), *paged]
        if self._offload is Offload.PARAMETERS:
            parts += self._weights()
        dtype = "float32" if self._sharding.is_zero else self._gradient_dtype
        parts.append(_part(Category.GRADIENTS, "", dtype, self._sharding.share(self._request.trainable)))
        return _total(parts)

    def _gradient_part(self) -> Part:
        elements = self._gradient_share(self._request.trainable)
        return _part(Category.GRADIENTS, "", self._gradient_dtype, elements)

    def _weights(self) -> Iterator[Part]:
        frozen, share = self._request.frozen, self._weight_share
        if self._recipe.trains_adapters:
            unquantized = self._request.unquantized_parameters or 0
            for stored in self._recipe.frozen_base:
                key = EntryKey(Category.WEIGHTS, stored.component, stored.dtype)
                elements = frozen - unquantized
                yield key, ceil((share(elements) if stored.sharded else elements) * stored.bytes_each)
            if self._recipe.unquantized and unquantized:
                yield _part(Category.WEIGHTS, "frozen", self._recipe.unquantized, share(unquantized))
        elif frozen:
            yield _part(Category.WEIGHTS, "frozen", self._recipe.weights, share(frozen))
        for model in self._request.further:
            assert model.parameters is not None, "PlanRequest has checked it"
            yield _part(Category.WEIGHTS, model.name, model.held_in(self._recipe), share(model.parameters))
        trainable = share(self._request.trainable)
        if self._strategy is not Strategy.FSDP:
            yield _part(Category.WEIGHTS, "trainable", self._recipe.weights, trainable)
            return
        shard = self._recipe.updated
        if DTYPE_BYTES[self._recipe.compute] < DTYPE_BYTES[shard]:
            yield _part(Category.MASTER_WEIGHTS, "sharded", shard, trainable)
        else:
            yield _part(Category.WEIGHTS, "trainable", shard, trainable)

    def _states(self) -> Iterator[Part]:
        trainable = self._state_share(self._request.trainable)
        master = None if self._strategy is Strategy.FSDP else self._request.master
        if master is not None:
            yield _part(Category.MASTER_WEIGHTS, "", master, trainable)
        yield from self._optimizer_states(paged=False)

    def _optimizer_states(self, *, paged: bool) -> Iterator[Part]:
        """Yields the states that are paged, or those that are not; each of its kind however small its parameter is."""
        trainable = self._state_share(self._request.trainable)
        for state in self._request.optimizer.states:
            if (self._request.optimizer.paged and not is_scale(state)) is not paged:
                continue
            dtype = state.dtype or self._request.master or self._recipe.updated
            yield _part(Category.OPTIMIZER_STATE, state.component, dtype, ceil(trainable * state.elements))


def _part(category: Category, component: str, dtype: str, elements: int) -> Part:
    return EntryKey(category, component, dtype), elements * DTYPE_BYTES[dtype]


def _total(parts: Iterable[Part]) -> int:
    return sum(size for _, size in parts)


def _merge(parts: Iterable[Part]) -> dict[EntryKey, int]:
    entries: dict[EntryKey, int] = {}
    for key, size in parts:
        entries[key] = entries.get(key, 0) + size
    return entries


def setup_of(request: PlanRequest) -> dict[str, str | int | float]:
    """Returns what was asked for, as a plan shows it."""
    sharding = request.sharding
    setup: dict[str, str | int | float] = {
        "mode": "formula",
        "parameters": request.parameters,
        "trainable_parameters": request.trainable,
        "strategy": sharding.strategy.value,
        "world_size": sharding.world_size,
    }
    if sharding.offload is not Offload.NONE:
        setup["offload"] = sharding.offload.value
    if request.accumulation_steps > 1:
        setup["accumulation_steps"] = request.accumulation_steps
    return setup | further_setup(request.further)

"""The sentences under a plan by formula: what was assumed, so that nobody has to guess."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.planning.further import further_sharding
from memtrace.planning.recipe import DTYPE_BYTES
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import ZERO3_MAX_LIVE, ZERO3_SUB_GROUP, ZERO_REDUCE_BUCKET, Offload, Strategy
from memtrace.record.units import GB


def of(request: PlanRequest) -> Iterator[str]:
    """Yields the assumptions behind the plan for a request, as sentences."""
    recipe = request.recipe
    yield f"Recipe {recipe.name}: {recipe.summary}."
    yield from _activations(request)
    for model in request.further:
        yield f"{model.name}: its weights are counted in {model.held_in(recipe)}, its forward pass is not."
    yield from further_sharding(request.further, request.sharding)
    if not request.optimizer.steps:
        yield str(request.optimizer.note)
        return
    if recipe.trains_adapters and request.trainable_parameters is None:
        yield (
            f"{request.trainable:,} adapter parameters: 0.2 % of the base, the share that the QLoRA paper calls "
            "commonly used."
        )
    if recipe.quantizes:
        if request.unquantized_parameters is None:
            yield (
                "All base weights are quantized; embedding, head and norms, which libraries leave in "
                f"{recipe.unquantized}, take more: --unquantized-params says how many they are."
            )
        yield "One weight at a time is unpacked for its product: a third of a layer at most."
    if recipe.casts and request.sharding.strategy is Strategy.ZERO3:
        yield "Autocast copies are counted for one unit: the linear layers of ZeRO 3 do not keep them."
    elif recipe.casts and request.sharding.strategy is not Strategy.FSDP:
        yield "Autocast copies are counted for all trained parameters; embeddings and norms are not cast."
    if request.optimizer.note:
        yield request.optimizer.note
    if request.accumulation_steps == 1 and request.activations:
        yield (
            "The peak counts activations and gradients both whole. So it is with gradient accumulation; with one micro "
            "batch gradients come as activations go, and the peak is an upper bound."
        )
    yield from _sharding(request)
    yield from _step(request)


def _activations(request: PlanRequest) -> Iterator[str]:
    compute = request.recipe.compute
    if request.activations is None:
        yield "Activations are not counted: no ratio and no bytes were given."
    elif request.activation_ratio is not None:
        yield (
            f"Activations are {request.activation_ratio:g} times the bytes of the weights in {compute}, whatever batch "
            "and sequence length: a rule of thumb; plan from a configuration to have them simulated."
        )


def _sharding(request: PlanRequest) -> Iterator[str]:
    sharding, recipe = request.sharding, request.recipe
    if sharding.strategy is Strategy.DDP and not recipe.gradients_persist:
        if sharding.gradient_as_bucket_view:
            yield "DDP: gradients are views of the buckets, which stay allocated between steps."
        else:
            yield "DDP: its buckets (25 MiB each) together are a second copy of all gradients."
    if sharding.is_zero and not recipe.gradients_persist:
        if recipe.master is None and request.master is not None:
            yield "DeepSpeed's ZeRO optimizers keep float32 master copies of their share whatever the recipe."
        bucket = ZERO_REDUCE_BUCKET * DTYPE_BYTES[recipe.weights] / GB
        yield f"DeepSpeed: the reduce bucket is {ZERO_REDUCE_BUCKET:,} elements, {bucket:g} GB, its default."
    if sharding.strategy in (Strategy.ZERO1, Strategy.ZERO2):
        yield "DeepSpeed gathers updated weights in place: the all-gather bucket takes no memory of its own."
    if sharding.strategy is Strategy.ZERO3:
        yield f"ZeRO 3 keeps up to {ZERO3_MAX_LIVE:,} gathered parameters (stage3_max_live_parameters)."
    if sharding.strategy is Strategy.FSDP:
        yield (
            f"FSDP gathers units of {request.largest_layer:,} parameters: one in use, the next on its way, and in the "
            "backward pass the whole gradients of one."
        )
    if sharding.shards_weights and request.largest_layer_parameters is None:
        yield f"The largest unit is taken to be one of {request.layers} equal layers."
    if sharding.offload is not Offload.NONE:
        yield "Offloaded states are counted for the host; staging buffers on the device are not counted."


def _step(request: PlanRequest) -> Iterator[str]:
    copies = request.optimizer.foreach_copies
    if copies and not request.sharding.brings_fused_step:
        elements = request.trainable
        if request.sharding.shards_states:
            elements = request.sharding.share(elements)
        if request.sharding.strategy is Strategy.ZERO3:
            elements = min(elements, ZERO3_SUB_GROUP)
        size = copies * elements * DTYPE_BYTES[request.recipe.updated]
        yield (
            f"The optimizer's step is fused. torch's foreach step, the default of {request.optimizer.source} on a GPU, "
            f"holds {size / GB:.4g} GB of temporaries besides; the upper end of the range counts them."
        )
    elif request.sharding.copies_gradients and request.recipe.gradients != "float32":
        yield "During the step each rank holds its gradients in float32, too, as DeepSpeed's optimizers do."

"""The sentences under a simulated plan of one rank: what was taken of the engine, so that nobody has to guess."""

from __future__ import annotations

from collections.abc import Iterator

from memtrace.planning.recipe import DEEPSPEED_CONVERTS, Recipe
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy


def sharding_assumptions(sharding: Sharding, recipe: Recipe) -> Iterator[str]:
    """Yields what a simulated plan assumes about the engine that shards the model."""
    if sharding.strategy is Strategy.NONE:
        return
    if sharding.is_zero and recipe.casts:
        yield DEEPSPEED_CONVERTS
    if sharding.shards_weights and recipe.quantizes:
        yield (
            f"4-bit weights are packed as {recipe.compute} (bnb_4bit_quant_storage) and shared out; as uint8, the "
            "default, FSDP2 under accelerate leaves them whole on each rank."
        )
    if sharding.offload is not Offload.NONE:
        what = "Shards of weights, masters" if sharding.offloads_weights else "Masters"
        yield (
            f"{what}, optimizer states and reduced gradients are in the memory of the host, where the step runs, and "
            "so is what DeepSpeed keeps there between device and host. Rounding of pinned memory is not counted."
        )
    yield f"The figures are those of rank {sharding.rank} of {sharding.world_size}."
    if sharding.strategy is Strategy.FSDP:
        yield (
            "FSDP2 shards each element of the model's outermost module lists, and the rest with the root; it computes "
            "in the type of the recipe and reduces gradients in float32."
        )
        yield "Collectives of FSDP2 end at once; on a GPU a stream can hold their buffers a little longer."
        if sharding.offloads_weights:
            yield "The copies of one layer's shards that are gathered from are not counted on the device."
    elif sharding.strategy is Strategy.DDP:
        yield "DDP keeps its buckets from step to step and reduces with the last micro batch (no_sync before)."
    elif sharding.strategy is Strategy.ZERO0:
        yield "DeepSpeed 0.19: whole float32 masters; gradients are reduced in flat copies of one bucket."
    else:
        buckets = "two reduce buckets" if sharding.overlap_comm else "one reduce bucket"
        yield (
            f"DeepSpeed 0.19 with {buckets} of {sharding.reduce_bucket:,} elements (reduce_bucket_size, overlap_comm), "
            "contiguous_gradients, gradients summed in the type of the weights, and one parameter group."
        )
        if sharding.strategy is Strategy.ZERO3:
            zero3 = sharding.zero3
            yield (
                f"ZeRO 3 gathers {zero3.prefetch_bucket:,} elements ahead while at most {zero3.max_live:,} are live, "
                f"keeps weights that are used again within {zero3.max_reuse:,}, and parameters of up to "
                f"{zero3.persistence_threshold:,} always; gathers end at once."
            )
        yield "DeepSpeed computes the norm of the gradients from float64 copies, one after the other."

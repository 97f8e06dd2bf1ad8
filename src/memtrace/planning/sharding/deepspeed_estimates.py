"""DeepSpeed's own estimators of model states, constant for constant.

They are here so that figures from DeepSpeed's documentation can be reproduced, not because they are better: they know
one recipe (16-bit weights and gradients, float32 masters, Adam), no buckets, no activations, and DeepSpeed prints
their GiB as GB. Source: DeepSpeed 0.19, `estimate_zero2_model_states_mem_needs` in
deepspeed/runtime/zero/stage_1_and_2.py and `estimate_zero3_model_states_mem_needs` in deepspeed/runtime/zero/stage3.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memtrace.errors import PlanError
from memtrace.planning.formula import setup_of
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import Offload, Strategy
from memtrace.record.breakdown import Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import ByteRange, Plan

BUFFER_FACTOR = 1.5
"""What DeepSpeed multiplies host memory with (`additional_buffer_factor`)."""

_RECIPES = ("bf16-master", "fp16-master")
_OPTIMIZERS = ("adam", "adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """How many GPUs there are, and in how many machines."""

    gpus_per_node: int = 1
    nodes: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What DeepSpeed's estimators return, in bytes."""

    cpu_bytes: int
    """For each machine."""
    gpu_bytes: int
    """For each GPU."""


def zero2_estimate(parameters: int, cluster: Cluster, *, offload: bool) -> Estimate:
    """Returns what `estimate_zero2_model_states_mem_needs` does: 2 bytes a parameter everywhere, 18 shared out."""
    if offload:
        return Estimate(cpu_bytes=int(parameters * max(4 * cluster.gpus, 16) * BUFFER_FACTOR), gpu_bytes=2 * parameters)
    return Estimate(
        cpu_bytes=int(parameters * 4 * cluster.gpus_per_node * BUFFER_FACTOR),
        gpu_bytes=2 * parameters + int(18 * parameters / cluster.gpus),
    )


def zero3_estimate(
    parameters: int, largest_layer: int, cluster: Cluster, *, offload: Offload, zero_init: bool = True
) -> Estimate:
    """Returns what `estimate_zero3_model_states_mem_needs` does: 4 bytes for the largest layer, the rest shared out.

    Args:
        parameters: of the model.
        largest_layer: parameters of the module that has most of its own.
        cluster: the machines.
        offload: what is kept in host memory.
        zero_init: whether the model is built under `deepspeed.zero.Init`, so that no rank ever holds all of it.
    """
    layer = 4 * largest_layer
    shared = {Offload.NONE: 18, Offload.OPTIMIZER: 2, Offload.PARAMETERS: 0}[offload]
    on_host = {Offload.NONE: 0, Offload.OPTIMIZER: 16, Offload.PARAMETERS: 18}[offload]
    node_share = 1 / cluster.nodes
    if offload is Offload.NONE:
        host: float = (largest_layer if zero_init else parameters) * 4 * cluster.gpus_per_node
    else:
        spread = parameters * on_host * node_share  # in DeepSpeed's order: floats round differently in another
        host = spread if zero_init else parameters * max(4 * cluster.gpus_per_node, on_host * node_share)
    return Estimate(cpu_bytes=int(host * BUFFER_FACTOR), gpu_bytes=layer + int(shared * parameters / cluster.gpus))


def plan_by_deepspeed(request: PlanRequest, *, nodes: int = 1) -> Plan:
    """Returns DeepSpeed's estimate as a plan; its peak adds up to DeepSpeed's figure to the byte.

    Args:
        request: ZeRO stage 2 or 3, a recipe with float32 masters of 16-bit weights, and Adam.
        nodes: machines that the world is spread over evenly.

    Raises:
        PlanError: DeepSpeed has no estimator for the request.
    """
    sharding, strategy = request.sharding, request.sharding.strategy
    if strategy not in (Strategy.ZERO2, Strategy.ZERO3):
        raise PlanError(f"DeepSpeed's estimators know ZeRO 2 and 3 only, got {strategy}")
    if request.recipe.name not in _RECIPES or request.optimizer.name not in _OPTIMIZERS:
        raise PlanError(
            f"DeepSpeed's estimators know the recipes {' and '.join(_RECIPES)} with {' or '.join(_OPTIMIZERS)} only, "
            f"got {request.recipe.name} with {request.optimizer.name}"
        )
    if request.further:
        raise PlanError("DeepSpeed's estimators know no further models: leave them or --constants deepspeed out")
    if nodes < 1 or sharding.world_size % nodes:
        raise PlanError(f"nodes must divide the world size {sharding.world_size}, got {nodes}")
    cluster = Cluster(gpus_per_node=sharding.world_size // nodes, nodes=nodes)
    if strategy is Strategy.ZERO2:
        estimate = zero2_estimate(request.parameters, cluster, offload=sharding.offload is not Offload.NONE)
    elif request.largest_layer_parameters is None:
        raise PlanError(
            "DeepSpeed's estimator for ZeRO 3 needs the parameters of the largest layer: give --largest-layer-params"
        )
    else:
        estimate = zero3_estimate(
            request.parameters, request.largest_layer_parameters, cluster, offload=sharding.offload
        )
    peak = Breakdown(
        moment=Moment.PEAK, entries=ordered_entries(dict(_entries(request, estimate.gpu_bytes))), estimated=True
    )
    return Plan(
        recipe=request.recipe.name,
        optimizer=request.optimizer.name,
        setup={**setup_of(request), "mode": "deepspeed", "nodes": nodes},
        moments={Moment.PEAK: peak},
        assumptions=(
            "DeepSpeed's own constants: model states only, without activations, buckets, context and libraries.",
            "DeepSpeed prints the same figure in GiB and calls it GB.",
        ),
        allocated=ByteRange(low=peak.total_bytes, high=None),
        host_bytes=estimate.cpu_bytes,
    )


def _entries(request: PlanRequest, gpu_bytes: int) -> Iterator[tuple[EntryKey, int]]:
    """Yields DeepSpeed's figure by category; what its rounding leaves over goes to the weights.

    Its 18 bytes are float32 masters, gradients and two moments, and 2 bytes more: 16-bit gradients in stage 2, whose
    weights are whole on every rank, and 16-bit weights in stage 3.
    """
    sharding, low = request.sharding, request.recipe.weights
    rest = gpu_bytes
    if sharding.strategy is Strategy.ZERO3:
        layer = 2 * (request.largest_layer_parameters or 0)
        yield EntryKey(Category.TRANSIENT_WEIGHTS, "all_gather", low), layer
        yield EntryKey(Category.GRADIENTS, "unsharded", low), layer
        rest -= 2 * layer
    if sharding.offload is Offload.NONE:
        for key, each in (
            (EntryKey(Category.MASTER_WEIGHTS, "", "float32"), 4),
            (EntryKey(Category.GRADIENTS, "", low), 2 if sharding.strategy is Strategy.ZERO2 else 0),
            (EntryKey(Category.GRADIENTS, "", "float32"), 4),
            (EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"), 4),
            (EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"), 4),
        ):
            size = each * request.parameters // sharding.world_size
            yield key, size
            rest -= size
    yield EntryKey(Category.WEIGHTS, "trainable", low), rest

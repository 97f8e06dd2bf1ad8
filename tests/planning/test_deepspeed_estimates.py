"""DeepSpeed's estimators, to the byte.

The figures were recorded from deepspeed 0.19.8's own functions for its documentation's example: 2,851 million
parameters of which the largest layer has 32 million. With the same random arguments as often as 8,000 times, ours and
DeepSpeed's returned the same.
"""

from __future__ import annotations

from typing import Any

import pytest

from memtrace.errors import PlanError
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.deepspeed_estimates import Cluster, plan_by_deepspeed, zero2_estimate, zero3_estimate
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.record.categories import Category, Moment

P, LARGEST = 2_851_000_000, 32_000_000
ONE, TWO_NODES, ODD = Cluster(), Cluster(gpus_per_node=8, nodes=2), Cluster(gpus_per_node=3, nodes=5)


@pytest.mark.parametrize(
    ("cluster", "offload", "cpu", "gpu"),
    [
        (ONE, True, 68_424_000_000, 5_702_000_000),
        (ONE, False, 17_106_000_000, 57_020_000_000),
        (TWO_NODES, True, 273_696_000_000, 5_702_000_000),
        (TWO_NODES, False, 136_848_000_000, 8_909_375_000),
        (ODD, True, 256_590_000_000, 5_702_000_000),
        (ODD, False, 51_318_000_000, 9_123_200_000),
    ],
)
def test_zero_2(cluster: Cluster, offload: bool, cpu: int, gpu: int) -> None:
    """`estimate_zero2_model_states_mem_needs`."""
    found = zero2_estimate(P, cluster, offload=offload)
    assert (found.cpu_bytes, found.gpu_bytes) == (cpu, gpu)


@pytest.mark.parametrize(
    ("cluster", "offload", "zero_init", "cpu", "gpu"),
    [
        (ONE, Offload.PARAMETERS, True, 76_977_000_000, 128_000_000),
        (ONE, Offload.OPTIMIZER, True, 68_424_000_000, 5_830_000_000),
        (ONE, Offload.NONE, True, 192_000_000, 51_446_000_000),
        (ONE, Offload.NONE, False, 17_106_000_000, 51_446_000_000),
        (TWO_NODES, Offload.PARAMETERS, True, 38_488_500_000, 128_000_000),
        (TWO_NODES, Offload.PARAMETERS, False, 136_848_000_000, 128_000_000),
        (TWO_NODES, Offload.OPTIMIZER, True, 34_212_000_000, 484_375_000),
        (TWO_NODES, Offload.NONE, True, 1_536_000_000, 3_335_375_000),
        (ODD, Offload.PARAMETERS, True, 15_395_400_000, 128_000_000),
        (ODD, Offload.OPTIMIZER, True, 13_684_800_000, 508_133_333),
        (ODD, Offload.OPTIMIZER, False, 51_318_000_000, 508_133_333),
        (ODD, Offload.NONE, False, 51_318_000_000, 3_549_200_000),
    ],
)
def test_zero_3(cluster: Cluster, offload: Offload, zero_init: bool, cpu: int, gpu: int) -> None:
    """`estimate_zero3_model_states_mem_needs`."""
    found = zero3_estimate(P, LARGEST, cluster, offload=offload, zero_init=zero_init)
    assert (found.cpu_bytes, found.gpu_bytes) == (cpu, gpu)


def request(strategy: Strategy, recipe: str = "bf16-master", optimizer: str = "adamw", **fields: Any) -> PlanRequest:
    """A request for the documentation's example over 15 ranks."""
    offload = fields.pop("offload", Offload.NONE)
    return PlanRequest(
        parameters=P,
        recipe=find_recipe(recipe),
        optimizer=find_optimizer(optimizer),
        sharding=Sharding(strategy=strategy, world_size=15, offload=offload),
        **fields,
    )


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
def test_a_plan_adds_up_to_the_estimate(offload: Offload) -> None:
    """The categories of the peak are DeepSpeed's figure to the byte, also where it rounds."""
    asked = request(Strategy.ZERO3, largest_layer_parameters=LARGEST, offload=offload)
    expected = zero3_estimate(P, LARGEST, ODD, offload=offload)
    plan = plan_by_deepspeed(asked, nodes=5)
    assert (plan.total_bytes, plan.host_bytes) == (expected.gpu_bytes, expected.cpu_bytes)
    plan = plan_by_deepspeed(request(Strategy.ZERO2, offload=offload), nodes=5)
    assert plan.total_bytes == zero2_estimate(P, ODD, offload=offload is not Offload.NONE).gpu_bytes


def test_the_categories_of_zero_2() -> None:
    """2 bytes of weights everywhere; masters, gradients twice, and two moments shared out."""
    peak = plan_by_deepspeed(request(Strategy.ZERO2), nodes=1).moments[Moment.PEAK]
    assert peak.by_category() == {
        Category.WEIGHTS: pytest.approx(2 * P, abs=5),
        Category.MASTER_WEIGHTS: 4 * P // 15,
        Category.GRADIENTS: 2 * P // 15 + 4 * P // 15,
        Category.OPTIMIZER_STATE: 2 * (4 * P // 15),
    }


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        (request(Strategy.ZERO1), 1, "ZeRO 2 and 3 only"),
        (request(Strategy.ZERO3), 1, "--largest-layer-params"),
        (request(Strategy.ZERO2, recipe="fp32"), 1, "bf16-master and fp16-master"),
        (request(Strategy.ZERO2, optimizer="sgd"), 1, "adam or adamw"),
        (request(Strategy.ZERO2), 4, "nodes must divide the world size 15, got 4"),
    ],
)
def test_what_deepspeed_does_not_estimate(asked: PlanRequest, nodes: int, said: str) -> None:
    """There is no estimator for other stages, recipes and optimizers; the error says so."""
    with pytest.raises(PlanError, match=said):
        plan_by_deepspeed(asked, nodes=nodes)

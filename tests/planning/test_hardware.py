"""The devices, and the plan held against them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.hardware import (
    COMMUNICATOR,
    CONTEXT,
    DEVICES,
    SLACK_RATIO,
    find_device,
    held_against,
    known_as,
)
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.record.plan import Fit, Plan, Verdict
from memtrace.record.units import GB, GIB, MIB


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_sizes_are_consistent(device) -> None:
    """What a process can use is a little less than what the driver reports, and that is about what is sold."""
    driver = device.driver_mib * MIB
    sold = int(device.marketing.split()[0])
    assert 0.955 * driver < device.usable_bytes < driver
    assert 0.98 * sold * GB < driver <= 1.025 * sold * GIB


def test_a_device_is_found_by_the_beginning_of_its_name() -> None:
    """H100 means the only H100; A100 could be two."""
    assert find_device("h100") is DEVICES["H100-80GB"]
    assert find_device("L4") is DEVICES["L4"]
    with pytest.raises(PlanError, match="any of A100-40GB, A100-80GB"):
        find_device("A100")
    with pytest.raises(PlanError, match="unknown device 'H300-80GB': did you mean"):
        find_device("H300-80GB")
    with pytest.raises(PlanError, match="any of"):
        find_device("")


def plan(activation_ratio: float | None = 0.3) -> Plan:
    """One billion parameters in pure bf16 with SGD: 4 GB and activations."""
    return plan_by_formula(
        PlanRequest(
            parameters=10**9,
            recipe=find_recipe("pure-bf16"),
            optimizer=find_optimizer("sgd"),
            activation_ratio=activation_ratio,
        )
    )


def fit_of(planned: Plan, capacity: int, ranks: int = 1) -> Fit:
    """The fit of a plan on a device of that capacity."""
    fit = held_against(planned, "any", capacity, ranks).fit
    assert fit is not None
    return fit


def test_context_and_slack_are_added() -> None:
    """The least is the least that is allocated and the least context; the most has the slack, too."""
    needed = fit_of(plan(), 8 * GIB).needed
    assert needed.low == 4 * GB + CONTEXT.low
    assert CONTEXT.high is not None
    assert needed.high == int(4_600_000_000 * (1 + SLACK_RATIO)) + CONTEXT.high


def test_several_ranks_need_a_communicator() -> None:
    """NCCL's memory is counted from two ranks on."""
    assert fit_of(plan(), 8 * GIB, 2).needed == fit_of(plan(), 8 * GIB).needed + COMMUNICATOR


def test_simulated_blocks_need_no_slack() -> None:
    """Where the allocator was simulated its reserve is the most."""
    needed = fit_of(replace(plan(), reserved_bytes=5 * GB), 8 * GIB).needed
    assert CONTEXT.high is not None
    assert needed.high == 5 * GB + CONTEXT.high


def test_what_cannot_be_known_of_the_reserve_is_in_the_most() -> None:
    """A margin of a tenth raises the most that a plan needs by a tenth of what is reserved."""
    needed = fit_of(replace(plan(), reserved_bytes=5 * GB, reserved_margin=0.1), 8 * GIB).needed
    assert CONTEXT.high is not None
    assert needed.high == int(5 * GB * 1.1) + CONTEXT.high


@pytest.mark.parametrize(
    ("said", "device"),
    [
        ("H200-141GB", "H200-141GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GH200 480GB", None),
        ("24GiB", None),
    ],
)
def test_a_device_is_known_by_what_its_driver_calls_it(said: str, device: str | None) -> None:
    """Whole words only; a capacity is no device."""
    assert known_as(said) is (None if device is None else DEVICES[device])


def test_cublas_keeps_four_times_as_much_from_hopper_on() -> None:
    """32 MiB for each thread that multiplies, 8,519,680 bytes before."""
    large = {name for name, device in DEVICES.items() if device.workspace_bytes == 32 * MIB}
    assert large == {"H100-80GB", "H200-141GB", "B200-180GB", "RTX-5090"}
    assert {DEVICES[name].workspace_bytes for name in DEVICES.keys() - large - {"MI300X-192GB"}} == {8_519_680}


@pytest.mark.parametrize(
    ("capacity", "ratio", "verdict"),
    [
        (8 * GIB, 0.3, Verdict.FITS),
        (5 * GIB, 0.3, Verdict.UNCERTAIN),
        (8 * GIB, None, Verdict.UNCERTAIN),
        (4 * GB, 0.3, Verdict.DOES_NOT_FIT),
        (4 * GB, None, Verdict.DOES_NOT_FIT),
    ],
)
def test_verdicts(capacity: int, ratio: float | None, verdict: Verdict) -> None:
    """Unknown activations can be too many, so without them nothing surely fits."""
    assert held_against(plan(ratio), "any", capacity, 1).verdict is verdict

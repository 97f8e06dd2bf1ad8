"""The GPU of this machine, through the real binding and a driver library of ours."""

from __future__ import annotations

import pytest
from stub_nvml import StubProcess

A = "GPU-11111111-1111-1111-1111-111111111111"
B = "GPU-22222222-2222-2222-2222-222222222222"
TWO = f"device {A} NVIDIA One\ntotal 1000\nreserved 100\nfree 900\ndevice {B} NVIDIA Two\ntotal 2000\nfree 2000\n"


def local(driver: StubProcess, **environment: str) -> list[object]:
    """What `local_device` returns there, or the message of its error."""
    return driver.run(
        f"""
        from memtrace.errors import PlanError
        from memtrace.planning.local_device import local_device
        try:
            result = local_device({environment!r})
        except PlanError as error:
            result = ["error", str(error)]
        """
    )


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ({}, ["NVIDIA One", 900]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, ["NVIDIA Two", 2000]),
        ({"CUDA_VISIBLE_DEVICES": B}, ["NVIDIA Two", 2000]),
        ({"CUDA_VISIBLE_DEVICES": f"{B[:9]},{A[:9]}"}, ["NVIDIA Two", 2000]),
    ],
)
def test_the_first_visible_gpu_is_asked(stub_driver: StubProcess, visible: dict[str, str], found: list[object]) -> None:
    """Its total less what the driver keeps, whichever way it is named."""
    stub_driver.says(TWO)
    assert local(stub_driver, **visible) == found


@pytest.mark.parametrize("visible", ["", "7", "-1", "none"])
def test_no_visible_gpu_is_an_error(stub_driver: StubProcess, visible: str) -> None:
    """The message says how many there are and what the variable hides."""
    stub_driver.says(TWO)
    kind, message = local(stub_driver, CUDA_VISIBLE_DEVICES=visible)
    assert kind == "error" and "the driver lists 2" in str(message)


def test_no_driver_is_an_error(stub_driver: StubProcess) -> None:
    """A driver that does not start is named."""
    stub_driver.says("refuse nvmlInitWithFlags 9")
    kind, message = local(stub_driver)
    assert kind == "error" and "needs a GPU with its driver" in str(message)


def test_a_size_that_is_not_told_is_an_error(stub_driver: StubProcess) -> None:
    """Without a total there is nothing to hold a plan against."""
    stub_driver.says(f"{TWO}refuse nvmlDeviceGetMemoryInfo_v2 3")
    kind, message = local(stub_driver)
    assert kind == "error" and "--capacity" in str(message)

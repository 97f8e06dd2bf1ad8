"""20,000 steps with a thousand traces: the process holds in the end what it held at half-time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
from soak.soak_training import LOG_MAX_BYTES, TRACE_EVERY

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.xdist_group("soak")]

TESTS = Path(__file__).parents[1]
STEPS = 20_000
OBJECT_BYTES = 24
"""The smallest thing that could leak with each step: a float on Python's heap."""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process held, every hundred steps."""
    command = [
        sys.executable,
        str(TESTS / "soak" / "soak_training.py"),
        str(tmp_path_factory.mktemp("soak")),
        str(STEPS),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def last_half(soaked: dict[str, Any]) -> list[dict[str, int]]:
    samples: list[dict[str, int]] = soaked["samples"]
    return samples[len(samples) // 2 :]


def test_every_step_was_seen_and_one_in_twenty_was_traced(soaked: dict[str, Any]) -> None:
    """Otherwise the rest would show nothing."""
    assert (soaked["steps"], soaked["up"]) == (STEPS, True)
    assert soaked["traced_steps"] >= STEPS // TRACE_EVERY


def test_resident_memory_is_flat(soaked: dict[str, Any]) -> None:
    """Over the last half it grows by less than one float a step.

    The slope is not held against the scatter around it: the resident memory of a process at rest moves by single
    pages, seldom and hardly ever back, so that its scatter is below any slope that means something.
    """
    samples = last_half(soaked)
    steps, resident = ([float(sample[name]) for sample in samples] for name in ("step", "rss_bytes"))
    assert linear_regression(steps, resident).slope < OBJECT_BYTES
    assert max(resident) - resident[0] < OBJECT_BYTES * STEPS / 2


def test_threads_and_descriptors_stay(soaked: dict[str, Any]) -> None:
    """The same number all over the last half, with scrapes and rotations of the log between the samples.

    A sample may meet the sampling thread while it has a file of the system open to read the device: one descriptor
    more, at that instant.
    """
    samples = last_half(soaked)
    assert len({sample["threads"] for sample in samples}) == 1
    descriptors = [sample["descriptors"] for sample in samples]
    middle = len(descriptors) // 2
    assert min(descriptors[:middle]) == min(descriptors[middle:]) >= max(descriptors) - 1


def test_the_step_log_is_as_large_as_documented(soaked: dict[str, Any]) -> None:
    """Two files in the end, none above `log_max_bytes`, and more was written than both may hold."""
    samples = soaked["samples"]
    assert max(sample["largest_log_bytes"] for sample in samples) <= LOG_MAX_BYTES
    assert samples[-1]["log_files"] == max(sample["log_files"] for sample in samples) == 2
    assert sum(later["log_bytes"] < earlier["log_bytes"] for earlier, later in pairwise(samples)) >= 2

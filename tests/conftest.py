"""What all tests share."""

from __future__ import annotations

import gc
import os
import random
import sys

import pytest
from features import missing
from hypothesis import HealthCheck, settings

pytest_plugins = ("nothing_left", "prometheus_server", "stub_nvml")

# pytest imports readline, which may write the size of a terminal into the environment of the workers: tables would be
# as wide as that.
for _size in ("COLUMNS", "LINES"):
    os.environ.pop(_size, None)

# The same examples every time, on every machine, and no limit that the clock decides. `make test-long` tries fresh ones
# (`--hypothesis-profile=fresh`); what those find becomes an `@example` of its test.
_SETTINGS = {"database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_SETTINGS)
settings.register_profile("fresh", derandomize=False, max_examples=300, print_blob=True, **_SETTINGS)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file run on one worker, as those of files with one `xdist_group` do: what they share is made once.

    Long tests without a group go to whichever worker is free. What a version of torch lacks is said, see `features`.
    """
    for item in items:
        for needs in item.iter_markers("needs"):
            (feature,) = needs.args
            if missing(feature):
                item.add_marker(pytest.mark.skip(reason=f"these versions have no {feature}"))
        if not any(item.iter_markers("xdist_group")) and not any(item.iter_markers("long")):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a pytest with which groups are not kept together: everything that tests share would be made twice.

    pytest-xdist 3.8 writes the group into `_nodeid`, which pytest 9.2 does not read any more.
    """
    if config.getoption("dist", default="no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError("pytest-xdist cannot keep groups together with this pytest: see constraints.txt")


@pytest.fixture(scope="module", autouse=True)
def earlier_objects_are_not_collected() -> None:
    """Takes what imports and earlier modules have made out of garbage collection.

    Trainer, plans and runs from birth ask for collections: 1 ms each instead of 200 to 500.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same random numbers, whichever ran before it in its process."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)

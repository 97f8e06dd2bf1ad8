"""From which variable of its environment a process's torch takes the settings of CUDA's allocator, and what it says."""

from __future__ import annotations

import os
import re

NEW_NAME, OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"

_FIRST_WITH_NEW_NAME = (2, 10)
"""First version of torch that was seen to read `NEW_NAME`. It reads `OLD_NAME` too, where the new one is not set."""
_VERSION = re.compile(r"(\d+)\.(\d+)")


def variable_for(torch_version: str) -> str:
    """Returns the variable that a version of torch reads; the new name where no version is known."""
    found = _VERSION.match(torch_version)
    older = found is not None and (int(found[1]), int(found[2])) < _FIRST_WITH_NEW_NAME
    return OLD_NAME if older else NEW_NAME


def configured_settings(torch_version: str) -> str:
    """Returns the allocator settings of this process, as its environment has them; empty for torch's defaults.

    torch reads them once, when it first allocates: what the environment says later counts for the next process.
    """
    variable = variable_for(torch_version)
    found = os.environ.get(variable)
    return os.environ.get(OLD_NAME, "") if found is None and variable != OLD_NAME else found or ""

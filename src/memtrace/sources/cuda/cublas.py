"""What cuBLAS keeps of the memory of torch's allocator, from its first products on.

torch gives each handle a workspace, one for each thread and stream that multiplies, and never frees it. The training
loop and autograd's thread are two. cuBLASLt, which computes products with a bias, has workspaces of its own where torch
does not let the two share one.

Source: `parseChosenWorkspaceSize` in aten/src/ATen/cuda/CublasHandlePool.cpp, and `_parseChosenWorkspaceSize` in
aten/src/ATen/cuda/CUDABlas.cpp; seen on an H200 with torch 2.11.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memtrace.record.units import KIB, MIB

if TYPE_CHECKING:
    import torch

BEFORE_HOPPER = 2 * 4096 * KIB + 8 * 16 * KIB
"""Bytes of one workspace on devices of compute capability 8 and below."""
FROM_HOPPER = 32 * MIB
"""The same of 9 and above."""

_HOPPER = 9
_LT_KIB = 1024
_THREADS = 2
_SETTING = re.compile(r":([0-9]+):([0-9]+)")


def default_bytes(major: int) -> int:
    """Returns the bytes of one workspace where nothing is set, by the major compute capability of the device."""
    return FROM_HOPPER if major >= _HOPPER else BEFORE_HOPPER


def of_both_threads(nbytes: int) -> Sequence[int]:
    """Returns the workspaces of a training step: that of its loop and that of autograd's thread."""
    return (nbytes,) * _THREADS


def workspace_sizes(device: torch.device, environment: Mapping[str, str] = os.environ) -> Sequence[int]:
    """Returns the sizes of the blocks that cuBLAS may hold on a device; none where that is not CUDA's.

    At most one block for each size listed, on each stream that products run on.

    Args:
        device: a device whose context exists where it is CUDA's.
        environment: variables of the process; CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE change the sizes.
    """
    import torch  # noqa: PLC0415 - plans by formula do without

    if device.type != "cuda" or torch.version.cuda is None:
        return ()
    major, _ = torch.cuda.get_device_capability(device)
    return configured_sizes(major, environment)


def configured_sizes(major: int, environment: Mapping[str, str]) -> Sequence[int]:
    """Returns the sizes for a compute capability, as the environment changes them."""
    pairs = _SETTING.findall(environment.get("CUBLAS_WORKSPACE_CONFIG", ""))
    handle = sum(int(size) * int(count) * KIB for size, count in pairs) if pairs else default_bytes(major)
    chosen = environment.get("CUBLASLT_WORKSPACE_SIZE", "")
    lt = (int(chosen) if chosen.isdecimal() else _LT_KIB) * KIB
    return tuple(size for size in (*of_both_threads(handle), *of_both_threads(lt)) if size)

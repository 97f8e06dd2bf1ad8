"""Exceptions that say that memory has run out, and what can be learned from one."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from memtrace.errors import ConfigError
from memtrace.record.units import MIB, parse_bytes

MAX_MESSAGE = 300
"""Characters of an exception's first line in a report."""

_MAX_CAUSES = 8
_SIGNS = {
    "cpu": ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    "cuda": ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
}
"""What the message of a RuntimeError says when the memory of a device has run out: torch's allocators raise
OutOfMemoryError for CUDA, but the driver's calls and the CPU allocator raise a plain RuntimeError."""
_POOL_SEGMENTS = (2 * MIB, 20 * MIB)
"""Segments that CUDA's caching allocator asks the device for to serve a request of at most 1, and of at most 10 MiB."""
_CPU_REQUEST = re.compile(r"tried to allocate (\d+) bytes")
_CUDA_REQUEST = re.compile(r"Tried to allocate (\d+(?:\.\d+)? (?:[KMGT]iB|bytes))")


def out_of_memory(error: BaseException | None, device_type: str) -> BaseException | None:
    """Returns the error among `error` and its causes that says that the device's memory has run out; None otherwise.

    Args:
        error: an exception.
        device_type: `torch.device.type`. Memory of the host running out is no matter of a CUDA device's tracer.
    """
    for cause in _causes(error):
        if isinstance(cause, MemoryError) and device_type == "cpu":
            return cause
        if isinstance(cause, torch.OutOfMemoryError) and device_type != "cpu":
            return cause
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _SIGNS.get(device_type, ())):
            return cause
    return None


def is_pool_segment(size: int | None) -> bool:
    """Returns whether a size that CUDA's allocator tells, as observers and messages have it, hides a smaller request.

    Both tell the size of the segment that was wanted. A segment of 2 or 20 MiB is the same for many requests; a larger
    one is its request, rounded up to 2 MiB.
    """
    return size in _POOL_SEGMENTS


def requested_bytes(error: BaseException) -> int | None:
    """Returns what the message says was asked for, where it does; rounded as the message rounds it."""
    message = str(error)
    exact = _CPU_REQUEST.search(message)
    if exact is not None:
        return int(exact[1])
    rounded = _CUDA_REQUEST.search(message)
    if rounded is None:
        return None
    try:
        return parse_bytes(rounded[1].replace("bytes", "B"))
    except ConfigError:
        return None


def first_line(error: BaseException) -> str:
    """Returns type and first line of an exception, cut to `MAX_MESSAGE` characters."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


def failing_module(error: BaseException, model: nn.Module) -> str | None:
    """Returns the name of the innermost module of the model that was at work when the error was raised.

    The frames of the traceback tell: one whose `self` is a module of the model. None where there is none, as in the
    backward pass, which runs outside of Python.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    trace = error.__traceback__
    while trace is not None:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        found = name if name is not None else found
        trace = trace.tb_next
    return found


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(_MAX_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__

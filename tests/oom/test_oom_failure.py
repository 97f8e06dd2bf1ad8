"""Which exceptions say that memory has run out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memtrace.oom.failure import MAX_MESSAGE, failing_module, first_line, out_of_memory, requested_bytes

HUGE = 1 << 50
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.05 GiB is free."
)


def real_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(HUGE, dtype=torch.uint8)
    return caught.value


def test_real_failure_of_the_cpu_allocator() -> None:
    """What torch raises on this machine is recognised, with the exact size of the request."""
    error = real_error()
    assert out_of_memory(error, "cpu") is error
    assert requested_bytes(error) == HUGE


def test_failures_of_another_device_are_not_this_ones() -> None:
    """The host's memory is no matter of a CUDA device's tracer, nor the other way round."""
    assert out_of_memory(real_error(), "cuda") is None
    assert out_of_memory(MemoryError(), "cuda") is None
    assert out_of_memory(torch.OutOfMemoryError(CUDA_TEXT), "cpu") is None


def test_cuda_failures() -> None:
    """torch's own error, and errors of the driver and of cuBLAS that say the same."""
    error = torch.OutOfMemoryError(CUDA_TEXT)
    assert out_of_memory(error, "cuda") is error
    assert requested_bytes(error) == 2 * 2**30
    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert out_of_memory(RuntimeError(text), "cuda") is not None
        assert requested_bytes(RuntimeError(text)) is None


def test_python_memory_error_counts_on_a_cpu() -> None:
    """Python's own MemoryError, real."""
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert out_of_memory(caught.value, "cpu") is caught.value


def test_error_raised_from_a_failure_is_looked_through() -> None:
    """`raise ... from error` does not hide what happened; an error met while handling a failure is another matter."""
    wrapped = ValueError("training failed")
    wrapped.__cause__ = cause = real_error()
    assert out_of_memory(wrapped, "cpu") is cause
    unrelated = ValueError("another")
    unrelated.__context__ = real_error()
    assert out_of_memory(unrelated, "cpu") is None


def test_other_errors_are_left_alone() -> None:
    """Errors that only mention memory are no failures of it."""
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt(), None):
        assert out_of_memory(error, "cpu") is None


def test_message_is_one_bounded_line() -> None:
    """A long message with many lines becomes one line of bounded length."""
    assert first_line(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert len(first_line(RuntimeError("x" * 10_000))) == MAX_MESSAGE
    assert first_line(RuntimeError()) == "RuntimeError"


def test_innermost_module_of_the_traceback() -> None:
    """The module whose forward pass asked for memory is named as the model names it."""

    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.empty(HUGE, dtype=torch.uint8)

    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": nn.Sequential(Greedy())})["inner"])
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(1, 2))
    assert failing_module(caught.value, model) == "1.0"
    assert failing_module(caught.value, nn.Linear(2, 2)) is None
    assert failing_module(real_error(), model) is None

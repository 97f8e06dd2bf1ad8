"""What a tracer cannot see of a run: said once, in the log and as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Unseen(StrEnum):
    """What is not seen; the label `what` of `memtrace_not_seen`."""

    FORWARD = "forward"
    """The forward pass of the model."""
    STEP_END = "step_end"
    """The end of a step."""
    TRACE = "trace"
    """The allocator's events of a whole step."""
    ENGINE = "engine"
    """What a training engine keeps beside the model and the optimizer."""
    DEVICE = "device"
    """What lies on further devices of the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limitation:
    """One thing that is not seen, with what to do about it."""

    unseen: Unseen
    text: str


def no_forward(model: object) -> Limitation:
    """Returns what is said where optimizers step and nothing of the model is called."""
    return Limitation(
        unseen=Unseen.FORWARD,
        text=f"steps end, but neither {type(model).__name__} nor a module inside it is called: steps are counted and "
        "not traced, so that activations and the peak are not known. The loop uses the parameters by themselves, or a "
        "function that torch.compile has compiled with the model inside, or a copy of the model. Give memtrace the "
        "module that is called, or attach it before the function is compiled.",
    )


def endless_step(forward_passes: int) -> Limitation:
    """Returns what is said where forward pass follows forward pass and the optimizers do not step."""
    return Limitation(
        unseen=Unseen.STEP_END,
        text=f"a step has not ended after {forward_passes} forward passes: the optimizers that memtrace was given have "
        "not stepped. If the loop has made a new one, attach memtrace to that one.",
    )


def left_open(other_steps: int, seconds: float) -> Limitation:
    """Returns what is said where a recording was ended before its step, which somebody may have left.

    Args:
        other_steps: steps of another optimizer since the model was called last.
        seconds: how long it was recorded.
    """
    return Limitation(
        unseen=Unseen.TRACE,
        text=f"a recording was ended before its step, after {seconds:.0f} s and {other_steps} steps of an optimizer "
        "that memtrace was not given: the step was left, as by Ctrl-C, or it waits for something else. Training goes "
        "on without it, and a later step is traced.",
    )


def several_threads() -> Limitation:
    """Returns what is said where a part of a step runs on a thread whose allocations are not recorded."""
    return Limitation(
        unseen=Unseen.TRACE,
        text="steps are counted and not traced: a part of them runs on another thread than the one that has called the "
        "model first. On a CPU torch records the allocations of one thread alone; on a GPU those of all. Call the "
        "model, backward() and the optimizer's step() on one thread to have its steps traced.",
    )


def too_large(allocations: int) -> Limitation:
    """Returns what is said where the allocator's history has no room for one micro batch."""
    return Limitation(
        unseen=Unseen.TRACE,
        text=f"steps are counted and not traced: one micro batch allocates {allocations:,} times, more than the "
        "allocator's history is kept for. Counted steps show totals all the same; `memtrace plan` says what they are.",
    )


def traces_given_up() -> Limitation:
    """Returns what is said where the windows of many steps in a row were lost, or could not be opened."""
    return Limitation(
        unseen=Unseen.TRACE,
        text="steps are counted and not traced: the last recordings could not be begun, or were incomplete. Somebody "
        "else records, stops or replaces them, or they are too small for a step. trace_next() tries again.",
    )


def unread_engine(engine: str, keeps: str, version: str) -> Limitation:
    """Returns what is said where an engine is there and this version of torch does not show what it keeps.

    Args:
        engine: its name.
        keeps: what is not attributed.
        version: of torch.
    """
    return Limitation(
        unseen=Unseen.ENGINE,
        text=f"this version of torch ({version}) does not show what {engine} keeps: {keeps} are not attributed. "
        "docs/versions.md lists the versions that memtrace was run with.",
    )


def further_devices(watched: object, others: Sequence[object]) -> Limitation:
    """Returns what is said where the parameters of a model lie on several devices of one process.

    Args:
        watched: the device that is watched.
        others: those that are not, at least one.
    """
    names = ", ".join(map(str, others))
    return Limitation(
        unseen=Unseen.DEVICE,
        text=f"the model is spread over several devices: only {watched}, which holds most of it, is watched, and "
        f"nothing is known of {names}. What is shown is of one device; others may run out of memory before it.",
    )

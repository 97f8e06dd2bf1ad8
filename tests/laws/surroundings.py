"""What a run finds around it: hooks, methods, torch's registries and recorders, threads, files. None of it may differ
after a run that memtrace has watched."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from nothing_left import global_hooks_of_torch, memtrace_threads, recorders_of_torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


class Training(Protocol):
    """A model and what updates it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masters: Sequence[torch.Tensor]


def hooks_of(loop: Training) -> dict[str, dict[Any, Any]]:
    """Every hook on the model, its modules, its parameters and the optimizer, by where it is; empty places left out."""
    owners: list[tuple[str, object]] = [("optimizer", loop.optimizer), *loop.model.named_modules()]
    found = {
        f"{name}.{attribute}": dict(value)
        for name, owner in owners
        for attribute, value in vars(owner).items()
        if "hook" in attribute and isinstance(value, dict)
    }
    for name, parameter in [*loop.model.named_parameters(), *((f"master {i}", m) for i, m in enumerate(loop.masters))]:
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{attribute}"] = dict(getattr(parameter, attribute) or {})
    return {place: hooks for place, hooks in found.items() if hooks}


def methods_of(loop: Training) -> dict[str, object]:
    """What could have been replaced: attributes that the objects have of their own and that can be called."""
    owners: list[tuple[str, object]] = [("optimizer", loop.optimizer), *loop.model.named_modules()]
    return {
        f"{name}.{attribute}": value
        for name, owner in owners
        for attribute, value in vars(owner).items()
        if callable(value) and not isinstance(value, nn.Module)
    }


def operators_are_recorded() -> bool:
    """Whether a profile made now sees operators: memtrace switches them off while it records."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3).add(1)
    return "aten::add" in {event.key for event in profiler.key_averages()}


def open_files() -> dict[str, str]:
    """The file descriptors of the process and what each one is."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - the directory itself is one of them while it is read
        try:
            found[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except FileNotFoundError:
            continue
    return found


@contextmanager
def unchanged(loop: Training) -> Iterator[None]:
    """Asserts that model, optimizer, torch and the process are afterwards as they were before."""
    hooks, methods, registries = hooks_of(loop), methods_of(loop), global_hooks_of_torch()
    threads, collects = set(threading.enumerate()), gc.isenabled()
    if not recorders_of_torch():
        assert operators_are_recorded()  # the first profile of a process opens files of its own
    files = open_files()
    yield
    assert hooks_of(loop) == hooks
    assert methods_of(loop) == methods
    assert global_hooks_of_torch() == registries
    assert recorders_of_torch() == {}
    assert memtrace_threads() == []
    assert set(threading.enumerate()) <= threads
    assert operators_are_recorded()
    assert gc.isenabled() == collects
    assert open_files() == files

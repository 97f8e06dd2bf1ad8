"""Reads the reports of workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def traced(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the traced records of a run."""
    yield from (record for record in run["records"] if record["traced"])


def total(moment: dict[str, Any], category: str, component: str | None = None, dtype: str | None = None) -> int:
    """Returns the bytes of a category, or of one component or element type of it."""
    return sum(
        size
        for found, part, kind, size in moment["entries"]
        if found == category and component in (None, part) and dtype in (None, kind)
    )


def sum_of(moment: dict[str, Any]) -> int:
    """Returns the sum of all categories."""
    return sum(size for *_, size in moment["entries"])


def kept(moment: dict[str, Any], *, gradients: bool = True) -> dict[tuple[str, str, str], int]:
    """Returns what is in the breakdown of the end of a step of the kinds that an engine keeps."""
    kinds = ("weights", "master_weights", "optimizer_state", "comm_buffers", *(["gradients"] if gradients else []))
    return {(found, part, kind): size for found, part, kind, size in moment["entries"] if found in kinds}


def assert_counted_as_traced(run: dict[str, Any], *, gradients: bool = True) -> dict[tuple[str, str, str], int]:
    """Asserts that each counted step ends with what the first traced one ends with, and returns that.

    Args:
        run: the report of one engine.
        gradients: whether those, too, which an engine may keep where only a trace has seen them.
    """
    at_the_end = kept(next(traced(run))["moments"]["step_end"], gradients=gradients)
    counted = [record for record in run["records"] if not record["traced"]]
    assert counted
    for record in counted:
        found = kept(record["moments"]["step_end"], gradients=gradients)
        assert found == at_the_end, (record["step"], sorted(found.items() ^ at_the_end.items()))
    return at_the_end


def assert_law_1(run: dict[str, Any], traced_steps: int = 2) -> None:
    """On every traced step and moment the categories are what was allocated, byte for byte."""
    steps = list(traced(run))
    assert len(steps) == traced_steps
    for step in steps:
        for moment in step["moments"].values():
            assert sum_of(moment) == moment["allocated_bytes"]


def assert_trained_alike(run: dict[str, Any], engine: str) -> None:
    """Losses and final weights are those of the run without memtrace; the engine was found."""
    assert run["losses"] == run["plain_losses"]
    assert run["same_weights"]
    assert run["engines"] == [engine]

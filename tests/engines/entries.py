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

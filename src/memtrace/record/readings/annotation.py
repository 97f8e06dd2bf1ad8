"""What memtrace writes on blocks in an allocator's history, for memory_viz to show and `memtrace read` to take."""

from __future__ import annotations

PREFIX = "memtrace: "
"""What it begins with: category, component and element type follow."""


def annotation(category: str, component: str, dtype: str) -> str:
    """Returns the text of a category; a component and an element type that are not known are left out."""
    return PREFIX + " ".join(part for part in (category, component.replace(" ", "_"), dtype) if part)

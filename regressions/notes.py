"""What the largest jumps are: read in the sources of the releases."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a jump is."""

    release: str
    """The first row of the table that has it."""
    cases: str
    """Pattern of the cases' names."""
    title: str
    lines: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """The heading's place on the page."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


NOTES: tuple[Note, ...] = ()

BISECTED = ("",)
"""What `memtrace bisect` printed for one of the jumps."""

"""What a block was for, as far as somebody can tell, and who told it."""

from __future__ import annotations

from typing import NamedTuple

from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source


class Label(NamedTuple):
    """What one block was for."""

    category: Category
    component: str
    dtype: str
    source: Source


NOTHING = Label(Category.UNATTRIBUTED, "", "", Source.NONE)
"""Of a block that nobody can tell anything about."""

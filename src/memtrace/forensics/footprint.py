"""Bytes that Python 3.11 takes at most for plain values, as its allocator hands them out."""

from __future__ import annotations

PLACE, MEMO_PLACE = 32, 9
"""Of a place on the stack, which is copied twice when a tuple or a dictionary takes it, and of one in the memo."""
INTEGER, LONG_INTEGER, FLOAT = 32, 48, 32
TEXT = 16
"""Beyond what Python says of a text, for alignment."""
CONTAINER = 112
"""Of an empty list or dictionary, with the note that it is open; a tuple has fewer."""
ITEM, FIRST_ITEM = 9, 48
"""Of an item of a list, and those that are kept free for more from the first one on."""
SIZE_CLASSES = 29
"""Sizes of small objects with pools of their own in Python. One text that is kept holds a pool of 16 KiB, so that what
a batch of entries took and gave back is there for the next batch only if that one has objects of the same size."""

_FIRST_ENTRY, _ENTRY, _ENTRY_OF_MANY = 170, 64, 110
_MANY = 100


def dictionary_growth(before: int, added: int) -> int:
    """Returns what a dictionary of so many entries takes for more of them: its table doubles, and is copied."""
    first = 0 if before else _FIRST_ENTRY
    return first + (_ENTRY if before + added <= _MANY else _ENTRY_OF_MANY) * added
